"""Loading of model folders: what is sound is read, what is wrong or leads out of the folder is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from test_models import dit_settings, inputs, shaken

from bench import train
from fastdiff.models.checkpoint import load_checkpoint, save_checkpoint
from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.models.header import CheckpointError
from fastdiff.models.load import WEIGHTS, load_model


@pytest.fixture
def dit_folder(tmp_path) -> Path:
    """A small random DiT as `bench.train` exports it."""
    net = shaken(DiT(DiTConfig(**dit_settings("no bias, other eps"))))
    train.export(train.TASKS["dit"], net, dict(net.named_parameters()), tmp_path / "model")
    return tmp_path / "model"


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_loads_the_outer_and_the_inner_folder(dit_folder):
    inner = load_model(dit_folder / "transformer")
    for model in (load_model(dit_folder), inner):
        assert model.prediction == "v" and model.scheduler_config["beta_end"] == 0.02
        assert (model.channels, model.size, model.num_classes) == (1, 32, 10)
        assert model.config.norm_eps == 1e-3 and not model.net.training
        assert {p.dtype for p in model.net.parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(dit_folder, dtype=torch.bfloat16).net.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_loaded_weights_are_the_stored_halves(dit_folder):
    stored, _ = load_checkpoint(dit_folder / "transformer" / WEIGHTS)
    net = load_model(dit_folder).net
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in net.state_dict().items())
    x, t, labels = inputs()
    assert torch.isfinite(net(x, t, labels)).all()


def test_prediction_names(dit_folder):
    path = dit_folder / "scheduler" / "scheduler_config.json"
    for kind, name in (("epsilon", "noise"), ("sample", "data"), ("v_prediction", "v"), ("flow_prediction", "flow")):
        edit_json(path, prediction_type=kind)
        assert load_model(dit_folder).prediction == name
    edit_json(path, prediction_type="epsilon", _class_name="FlowMatchEulerDiscreteScheduler")
    assert load_model(dit_folder).prediction == "flow"
    edit_json(path, prediction_type="guess", _class_name="DDPMScheduler")
    with pytest.raises(ValueError, match="guess"):
        load_model(dit_folder)
    shutil.rmtree(dit_folder / "scheduler")
    assert load_model(dit_folder).scheduler_config == {}


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype"])
def test_weights_must_fit_the_model(dit_folder, fault):
    path = dit_folder / "transformer" / WEIGHTS
    tensors, metadata = load_checkpoint(path)
    name = "transformer_blocks.0.ff.net.2.weight"
    weight = tensors.pop(name)
    if fault == "extra":
        tensors |= {name: weight, "hook": weight}
    elif fault == "shape":
        tensors[name] = weight.T.contiguous()
    elif fault == "dtype":
        tensors[name] = weight.to(torch.int16)
    save_checkpoint(path, tensors, metadata)
    with pytest.raises(CheckpointError) as error:
        load_model(dit_folder)
    assert ("hook" if fault == "extra" else name) in str(error.value) and str(path) in str(error.value)


def test_sizes_of_a_hostile_config_are_refused_before_they_take_memory(dit_folder):
    sizes = {"num_attention_heads": 256, "attention_head_dim": 256, "num_layers": 200}  # 10 terabytes
    edit_json(dit_folder / "transformer" / "config.json", **sizes)
    with pytest.raises(CheckpointError, match="missing|shape"):
        load_model(dit_folder)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b"[" * 100000, b" " * (2 << 20)])
def test_config_files_that_are_not_objects_are_refused(dit_folder, raw):
    (dit_folder / "transformer" / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match="config.json"):
        load_model(dit_folder)


@pytest.mark.parametrize("class_name", [None, 3, [], "os.system", "FluxTransformer2DModel", "Classifier"])
def test_unknown_classes_are_refused(dit_folder, class_name):
    edit_json(dit_folder / "transformer" / "config.json", _class_name=class_name)
    with pytest.raises(ValueError, match="DiTTransformer2DModel"):
        load_model(dit_folder)


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["symlink out", "symlink inside", "broken symlink", "fifo", "folder", "absent"])
def test_only_regular_files_of_the_folder_are_read(dit_folder, file, kind):
    path = dit_folder / "transformer" / file
    other = dit_folder / "other" if kind == "symlink out" else path.with_name("other")
    path.rename(other)
    if "symlink" in kind:
        path.symlink_to(other)
    if kind == "broken symlink":
        other.unlink()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(CheckpointError, match=file):
        load_model(dit_folder)


def test_names_that_are_no_models_are_refused(dit_folder, tmp_path):
    with pytest.raises(ValueError, match="bundled:dit"):
        load_model("bundled:../../etc")
    with pytest.raises(ValueError, match="no folder"):
        load_model(tmp_path / "nothing")
    (dit_folder / "unet").mkdir()
    with pytest.raises(ValueError, match="both"):
        load_model(dit_folder)
