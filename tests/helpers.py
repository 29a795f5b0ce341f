"""Builders of small models and settings, and the places of data."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import settings as of_examples
from safetensors import safe_open
from transformers import AutoModelForImageClassification, SwinConfig, ViTConfig

from scalekd_hf import ScaleKDConfig, load_student


ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "tests" / "assets" / "digits"
TEACHER = ROOT / "tests" / "assets" / "teacher"
GOLDEN = Path(os.environ.get("SCALEKD_GOLDEN", ROOT.parent / "shared" / "golden"))

# The setting that recomputes activations, by its name in the installed transformers: another one before 5.24.
RECOMPUTE = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(ScaleKDConfig, name)
)

SMALL_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (1, 2, 2),
    "num_heads": (1, 2, 4),
}
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


def timm_swin(num_classes=10, **changes):
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=num_classes, **{**SMALL_SWIN, **changes})


def timm_vit(num_classes=10, **changes):
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **{**SMALL_VIT, **changes})


def transformers_swin(**changes):
    options = {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "num_labels": 10}
    return build(SwinConfig(**{**options, "depths": [1, 2, 2], "num_heads": [1, 2, 4], **changes}))


def transformers_vit(**changes):
    options = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    return build(ViTConfig(**{**options, "intermediate_size": 48, "num_labels": 10, **changes}))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def place(name="cuda"):
    """A device of that name; where no card is, a skip, or the CPU if SCALEKD_REHEARSE asks for a rehearsal there."""
    if name == "cpu" or torch.cuda.is_available():
        return torch.device(name)
    if not os.environ.get("SCALEKD_REHEARSE"):
        pytest.skip("needs a CUDA device")
    return torch.device("cpu")


def build(config):
    return AutoModelForImageClassification.from_config(config)


def small_student(**changes):
    """A convolutional student without BatchNorm, so that batches can be split exactly."""
    options = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "patch_size": 2, "num_classes": 10, "image_size": 32}
    return load_student("timm/convnext_atto", **{**options, **changes})


def settings(folder, **changes):
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "hflip": 0.0,
        "stem_norm": "layer",
    }
    options |= changes
    options.setdefault("dataloader_num_workers", 0 if options["use_cpu"] else 2)
    return ScaleKDConfig(**options)


def golden(name, device="cpu"):
    """Tensors and configuration of one file of the authors' code, or a skip with the reason."""
    file = GOLDEN / f"{name}.safetensors"
    if not file.exists():
        pytest.skip(f"the golden tensors of the authors' code are not here ({file.name})")
    with safe_open(file, "pt") as tensors:
        values = {key: tensors.get_tensor(key).to(device) for key in tensors.keys()}
        return values, json.loads((tensors.metadata() or {}).get("config", "{}"))


def projector_weights(values, prefix):
    """Golden weights under `prefix`, with the 1x1 convolution of the queries as the linear layer that it is."""
    weights = {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}
    return {key: value[..., 0, 0] if key == "query_proj.weight" else value for key, value in weights.items()}


def assert_close(actual, expected, name=""):
    """Equal to 1e-4 relative, against the largest magnitude of the tensor."""
    expected = expected.reshape(actual.shape)
    scale = expected.abs().max().clamp(min=1e-6)
    error = ((actual - expected).abs().max() / scale).item()
    assert error < 1e-4, f"{name}: relative difference {error:.2e}"


def assert_gradients(module, expected):
    """Every parameter's gradient equals the expected one; where that is rounding noise around 0, both are.

    Exactly 0 in exact arithmetic: what adds a constant to all keys, to a map before BatchNorm, or to all
    tokens before the direct component is removed.
    """
    assert set(expected) == {name for name, _ in module.named_parameters()}
    noise = 1e-5 * max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in module.named_parameters():
        if expected[name].abs().max() < noise:
            assert parameter.grad.abs().max() < noise, name
        else:
            assert_close(parameter.grad, expected[name], name)


def run(*words, env=None, timeout=300):
    """Run a command from the repository's root; returns the finished process with its text."""
    command = [str(word) for word in words]
    if command[0] == "python":
        command[0] = sys.executable
    return subprocess.run(command, cwd=ROOT, env=env, timeout=timeout, capture_output=True, text=True)


def some_slow(names, count):
    """Parameters of a test, of which all but the first few belong to the slow lane."""
    return [
        name
        if index < count
        else pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=pytest.mark.slow)
        for index, name in enumerate(names)
    ]


def examples(count):
    """So many of a property's examples, always the same; SCALEKD_EXAMPLES asks for more, and others each time."""
    asked = int(os.environ.get("SCALEKD_EXAMPLES", 0))
    slow = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much)
    return of_examples(
        max_examples=asked or count,
        derandomize=not asked,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),  # the first that fails is told, and none is made smaller
        suppress_health_check=slow,
    )


def images(count=2, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


class RangeServer:
    """An HTTP server on loopback that gives out files in parts, as the Hub does, and fails when it is told to."""

    def __init__(self, files):
        self.files, self.failures, self._every, self.requests = files, 0, 0, 0
        self._last = None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                outer.requests += body
                spent = outer._last is not None and outer.requests > outer._last
                if body and spent or body and outer._every and outer.requests % outer._every == 0:
                    outer.failures += 1
                    self.send_error(503)
                    return
                content = outer.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                start, stop = 0, len(content)
                wanted = self.headers.get("Range")
                if wanted:
                    first, last = wanted.removeprefix("bytes=").split("-")
                    start, stop = int(first), min(int(last) + 1, stop) if last else stop
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(stop - start))
                self.send_header("Accept-Ranges", "bytes")
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
                self.end_headers()
                if body:
                    self.wfile.write(content[start:stop])

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fail_every(self, requests):
        """Answer every so-and-so-manieth request with an error from now on; 0 for none."""
        self._every = requests

    def fail_after(self, requests):
        """Answer so many more requests, and then with errors only; None for no end."""
        self._last = None if requests is None else self.requests + requests

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def check_written(page, begin, end, rows):
    """The rows between two marks of a page in docs/ are these; SCALEKD_WRITE_DOCS writes them."""
    file = ROOT / "docs" / page
    before, _, rest = file.read_text().partition(begin)
    _, _, after = rest.partition(end)
    wanted = f"{before}{begin}\n" + "\n".join(rows) + f"\n\n{end}{after}"
    if os.environ.get("SCALEKD_WRITE_DOCS"):
        file.write_text(wanted)
    assert file.read_text() == wanted
