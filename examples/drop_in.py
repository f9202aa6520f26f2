"""A diffusers pipeline on fused kernels, in one line: `python examples/drop_in.py [FOLDER OF A SAVED PIPELINE]`.

Without a folder a small pipeline with random weights is made, so that this runs anywhere and without downloads.
"""

import argparse
import time

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel

import fastdiff


def small_pipeline() -> DiTPipeline:
    torch.manual_seed(0)
    shape = dict(sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=4)
    transformer = DiTTransformer2DModel(**shape, num_attention_heads=4, attention_head_dim=32)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = AutoencoderKL(**blocks, block_out_channels=(16, 32), norm_num_groups=8)
    return DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())


parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?")
parser.add_argument("--mode", default="exact", choices=["exact", "bf16", "w8a8"])
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.folder) if args.folder else small_pipeline()
pipe.set_progress_bar_config(disable=True)
prompt = dict(prompt="a lighthouse") if args.folder else dict(class_labels=[7])


def run():
    start = time.perf_counter()
    images = pipe(**prompt, num_inference_steps=10, generator=torch.manual_seed(3), output_type="np").images
    return torch.as_tensor(images), time.perf_counter() - start


before, _ = run()
fastdiff.accelerate(pipe, args.mode)  # the one line
run()  # the first call records the programs of its shapes
after, seconds = run()
print(fastdiff.report(pipe))
print(f"{seconds:.2f} s; pictures differ by {(after - before).abs().max():.1e} of 1")

fastdiff.undo(pipe)
again, seconds = run()
print(f"{seconds:.2f} s without; difference to before: {(again - before).abs().max():.0e}")
