"""Train the bundled models: `python -m bench.train dit|unet|classifier --minutes N`.

The budget is wall-clock time: the learning rate warms up and then falls along a cosine to zero at its end. Every few
minutes the training state and the averaged weights (half precision, diffusers layout) are written to --out, so that
a killed run goes on with --resume.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.fashion_mnist import DEFAULT_FOLDER, load_split, to_unit_range
from fastdiff.models.atomic import write_atomic
from fastdiff.models.checkpoint import load_checkpoint, save_checkpoint
from fastdiff.models.classifier import Classifier, ClassifierConfig
from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.models.unet import UNet, UNetConfig

Tensor = torch.Tensor
TRAIN_STEPS = 1000
BETAS = (1e-4, 0.02)
MAX_SNR = 5.0
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.999
WARMUP_STEPS = 300
SAVE_SECONDS = 180
LOG_STEPS = 50


@dataclass(frozen=True)
class Task:
    """What differs between the three trainings."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
    learning_rate: float
    batch: int
    folder: str
    class_name: str
    prediction: str | None
    pipeline: str | None = None


def alpha_bar(device: torch.device) -> Tensor:
    """Return the product of 1 - beta up to each timestep, `[1000]` float32 (Ho et al. 2020, section 2)."""
    betas = torch.linspace(*BETAS, TRAIN_STEPS, dtype=torch.float64)
    return (1 - betas).cumprod(0).float().to(device)


def noised(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x_t, t, noise, and alpha and sigma as `[B, 1, 1, 1]`; the timesteps are spread evenly over the batch."""
    batch, device = len(images), images.device
    spread = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
    t = (spread * (TRAIN_STEPS / batch)).long().clamp_(max=TRAIN_STEPS - 1).to(device)
    noise = torch.randn(images.shape, generator=generator).to(device)
    level = alpha_bar(device)[t][:, None, None, None]
    alpha, sigma = level.sqrt(), (1 - level).sqrt()
    return alpha * images + sigma * noise, t, noise, alpha, sigma


def dit_loss(net: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """v-prediction (Salimans and Ho 2022); weights capped at high SNR (Hang et al. 2023) but kept at low SNR."""
    x, t, noise, alpha, sigma = noised(images, generator)
    drop = torch.rand(len(labels), generator=generator).to(labels.device) < LABEL_DROPOUT
    v_pred = net(x, t, torch.where(drop, net.null_label, labels)).float()
    snr = (alpha / sigma) ** 2
    weight = (snr.clamp(max=MAX_SNR) + 1) / (snr + 1)
    return (weight * (v_pred - (alpha * noise - sigma * images)) ** 2).mean()


def unet_loss(net: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise prediction with weights min(snr, 5) / snr (Hang et al. 2023)."""
    x, t, noise, alpha, sigma = noised(images, generator)
    weight = MAX_SNR / ((alpha / sigma) ** 2).clamp(min=MAX_SNR)
    return (weight * (net(x, t).float() - noise) ** 2).mean()


def classifier_loss(net: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy on images that are shifted by up to one pixel; a mirrored shoe is not a shoe of the data."""
    dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return F.cross_entropy(net(images.roll((dy, dx), dims=(2, 3))).float(), labels, label_smoothing=0.05)


def build_dit() -> DiT:
    """DiT with the starting values of the paper: every block and the output begin as zero."""
    net = DiT(
        DiTConfig(
            num_attention_heads=6,
            attention_head_dim=32,
            in_channels=1,
            num_layers=6,
            patch_size=4,
            num_embeds_ada_norm=10,
        )
    )
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in net.transformer_blocks:
        nn.init.normal_(block.norm1.emb.class_embedder["embedding_table"].weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (net.proj_out_1, net.proj_out_2):
        nn.init.zeros_(layer.weight)
    return net


def build_unet() -> UNet:
    """UNet whose residual blocks and output begin as zero."""
    net = UNet(
        UNetConfig(
            sample_size=32,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64, 128),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=32,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )
    )
    for name, module in net.named_modules():
        if name.endswith(("conv2", "conv_out", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def build_classifier() -> Classifier:
    """Classifier of the default sizes."""
    return Classifier(ClassifierConfig())


TASKS = {
    "dit": Task(build_dit, dit_loss, 1e-3, 48, "transformer", "DiTTransformer2DModel", "v_prediction"),
    "unet": Task(build_unet, unet_loss, 8e-4, 32, "unet", "UNet2DModel", "epsilon", "DDPMPipeline"),
    "classifier": Task(build_classifier, classifier_loss, 2e-3, 128, "", "Classifier", None),
}


class Run:
    """Network, averaged copy, optimizer and position of one training."""

    def __init__(self, task: Task, device: torch.device) -> None:
        torch.manual_seed(0)
        self.task = task
        self.net = task.build().to(device).train()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.ema = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.step, self.seconds = 0, 0.0

    def update(self, loss: Tensor, progress: float) -> None:
        """One optimizer step at the learning rate of this point of the budget, then the average."""
        rate = self.task.learning_rate * min(1.0, (self.step + 1) / WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        parameters = [p.detach() for p in self.net.parameters()]
        torch._foreach_lerp_(list(self.ema.values()), parameters, 1 - decay)

    def save(self, out: Path) -> None:
        """Write the training state and the averaged weights."""
        state = {}
        for name, p in self.net.named_parameters():
            slots = self.optimizer.state[p]
            state |= {f"net.{name}": p, f"ema.{name}": self.ema[name]}
            state |= {f"{slot}.{name}": slots[slot] for slot in ("exp_avg", "exp_avg_sq", "step")}
        out.mkdir(parents=True, exist_ok=True)
        save_checkpoint(out / "state.safetensors", state, {"step": str(self.step), "seconds": f"{self.seconds:.1f}"})
        export(self.task, self.net, self.ema, out)

    def load(self, out: Path) -> None:
        """Go on from what `save` wrote."""
        state, metadata = load_checkpoint(out / "state.safetensors")
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                p.copy_(state[f"net.{name}"])
                self.ema[name].copy_(state[f"ema.{name}"])
                slots = ("exp_avg", "exp_avg_sq", "step")
                self.optimizer.state[p] = {slot: state[f"{slot}.{name}"].to(p.device) for slot in slots}


def export(task: Task, net: nn.Module, weights: dict[str, Tensor], out: Path) -> None:
    """Write the weights in half precision and the configurations in diffusers' folder layout."""
    folder = out / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", {"_class_name": task.class_name, **dataclasses.asdict(net.config)})
    halves = {name: weight.half() for name, weight in weights.items()}
    save_checkpoint(folder / "diffusion_pytorch_model.safetensors", halves, {"format": "pt"})
    if task.prediction is None:
        return
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": TRAIN_STEPS,
        "beta_start": BETAS[0],
        "beta_end": BETAS[1],
        "beta_schedule": "linear",
        "prediction_type": task.prediction,
        "variance_type": "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
    }
    (out / "scheduler").mkdir(exist_ok=True)
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    if task.pipeline is not None:
        parts = {task.folder: ["diffusers", task.class_name], "scheduler": ["diffusers", scheduler["_class_name"]]}
        _write_json(out / "model_index.json", {"_class_name": task.pipeline, **parts})


def train(run: Run, images: Tensor, labels: Tensor, minutes: float, batch: int, out: Path) -> None:
    """Train until the budget is used up or the process is asked to stop; save on the way and at the end."""
    device = images.device
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    spent, start = run.seconds, time.monotonic()
    saved = logged = start
    total = 0.0
    while run.seconds < minutes * 60 and not stop:
        generator = torch.Generator().manual_seed(run.step)
        pick = torch.randint(len(images), (batch,), generator=generator).to(device)
        with _fast_math(device):
            loss = run.task.loss(run.net, to_unit_range(images[pick]), labels[pick], generator)
        run.update(loss, run.seconds / (minutes * 60))
        now = time.monotonic()
        run.seconds = spent + now - start
        total += loss.detach()
        if run.step % LOG_STEPS == 0:
            speed = LOG_STEPS * batch / (now - logged)
            line = f"step {run.step} {run.seconds:.0f} s loss {total / LOG_STEPS:.4f} {speed:.1f} samples/s"
            print(line, flush=True)
            logged, total = now, 0.0
        if now - saved > SAVE_SECONDS:
            run.save(out)
            saved = now
    run.save(out)
    print(f"done: {run.step} steps of {batch}, {run.seconds:.0f} s", flush=True)


def accuracy(net: Classifier, weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
    """Return the share of the images that the classifier with these weights names right."""
    with torch.no_grad():
        right = 0
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            scores = torch.func.functional_call(net, weights, (to_unit_range(x),))
            right += int((scores.argmax(1) == y).sum())
    return right / len(images)


@contextlib.contextmanager
def _fast_math(device: torch.device):
    # bfloat16 was 1.25 to 1.7 times as fast as float32, and on 64 tokens the plain attention 1.2 times as fast in
    # training as the fused one (AMD EPYC with AVX512-BF16, torch 2.13, 2026-11)
    with contextlib.ExitStack() as stack:
        if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _write_json(path: Path, values: dict) -> None:
    write_atomic(path, [(json.dumps(values, indent=2) + "\n").encode()])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__)
    parser.add_argument("model", choices=list(TASKS))
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=None, help="images a step, default by model")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(TASKS[args.model], device)
    if args.resume:
        run.load(args.out)
    images, labels = (tensor.to(device) for tensor in load_split("train", args.data))
    train(run, images, labels, args.minutes, args.batch or run.task.batch, args.out)
    if args.model == "classifier":
        test_images, test_labels = (tensor.to(device) for tensor in load_split("test", args.data))
        print(f"test accuracy {accuracy(run.net, run.ema, test_images, test_labels):.4f}", flush=True)


if __name__ == "__main__":
    main()
