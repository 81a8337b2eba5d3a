"""The matrix as an image in the trackers of a Trainer: read back by TensorBoard and by Trackio."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from transformers import TrainerCallback

from diffora_trainer.hub.plots import Picture
from helpers import IMPORT_PATH
from helpers.trainers import CUT, WARMUP, make_trainer


TAG = "train/diffora/matrix"
# An architecture step after each of these; of five, each second one is drawn, and the last.
SEARCH_STEPS = range(WARMUP + 1, CUT + 1)
DRAWN = [4, 6, 8]


def tensorboard() -> dict[str, str]:
    """Arguments that report to TensorBoard; the test is skipped where it is not installed."""
    pytest.importorskip("tensorboard")
    return {"report_to": "tensorboard"}


def images(folder: Path, tag: str = TAG) -> dict[int, list[np.ndarray]]:
    """The images in the event files under a folder, by their steps."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: dict[int, list[np.ndarray]] = {}
    for path in folder.rglob("*tfevents*"):
        events = accumulator.EventAccumulator(str(path), size_guidance={"images": 0})
        events.Reload()
        for event in events.Images(tag) if tag in events.Tags()["images"] else []:
            found.setdefault(event.step, []).append(imread(io.BytesIO(event.encoded_image_string), format="png"))
    return found


def test_tensorboard_shows_the_search_and_the_choice(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, args=tensorboard())
    probe = Matrices(trainer)
    trainer.add_callback(probe)
    trainer.train()
    found = images(tmp_path)
    assert list(SEARCH_STEPS) == [4, 5, 6, 7, 8] and sorted(found) == DRAWN
    # The search ends where the pruning is: there, what was chosen is drawn.
    for step, (image,) in found.items():
        shown = np.round(image[..., :3] * 255).astype(np.uint8)
        expected = Picture.of(trainer.selection).pixels() if step == CUT else probe.pictures[step].pixels()
        assert shown.shape == expected.shape and (shown == expected).all(), step
    assert len({image.tobytes() for (image,) in found.values()}) == len(found)

    trainer.train()  # with the chosen modules alone: nothing is chosen, and nothing drawn
    assert images(tmp_path).keys() == found.keys() and all(len(images(tmp_path)[step]) == 1 for step in found)


class Matrices(TrainerCallback):
    """What the matrix is after each step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.pictures: dict[int, Picture] = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        run = self.trainer._session.run
        if run is not None:
            values = tuple(run.search.method.values().tolist())
            title = ("Differential Adaptation Matrix", f"step {state.global_step}, {run.phase}")
            scale = {"vmin": 0.0, "vmax": 1.0}
            self.pictures[state.global_step] = Picture(
                run.search.grid, values, "gate (0: closed, 1: open)", title, scale
            )


@pytest.mark.parametrize(
    ("search", "steps"),
    [
        ({"method": "snip"}, [CUT]),
        ({"method": "random", "discretize_at": 0}, [0]),
        ({"method": "snip", "method_options": {"reallocate_every": 1}}, [*range(WARMUP, CUT - 1, 2), CUT]),
        ({"fade_out": 3}, [5, CUT]),
    ],
    ids=["scored", "at once", "reallocated", "faded out"],
)
def test_other_ways_to_choose(search: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, args=tensorboard(), search=search)
    trainer.train()
    found = images(tmp_path)
    assert sorted(found)[-1] == steps[-1] and len(found) <= 5
    assert set(steps) <= set(found), sorted(found)


def test_nothing_is_drawn_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not without a tracker, and not on a process that does not report."""
    drawn: list[Picture] = []
    monkeypatch.setattr(Picture, "pixels", lambda self: drawn.append(self) or np.zeros((2, 2, 3), np.uint8))
    make_trainer(tmp_path / "none").train()
    assert not drawn
    trainer = make_trainer(tmp_path / "other", args=tensorboard())
    monkeypatch.setattr(type(trainer), "is_world_process_zero", lambda self: False)
    trainer.train()
    assert not drawn


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in {name for name in sys.modules if name.split(".")[0] == "matplotlib"} | {"matplotlib"}:
        monkeypatch.setitem(sys.modules, name, None)
    trainer = make_trainer(tmp_path, args=tensorboard())
    with caplog.at_level(logging.WARNING, "diffora_trainer"):
        trainer.train()
    assert len([r for r in caplog.records if "No image of the matrix is drawn without Matplotlib" in r.message]) == 1
    assert trainer.selection is not None and not images(tmp_path)


def test_a_tracker_that_fails_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(writer, "add_image", full)
    trainer = make_trainer(tmp_path, args=tensorboard())
    with caplog.at_level(logging.WARNING, "diffora_trainer"):
        trainer.train()
    assert len([r for r in caplog.records if "did not take the image of the matrix" in r.message]) == 1
    assert "No space left" in caplog.text and trainer.selection is not None


RUN = """
import sys
from helpers.trainers import make_trainer
trainer = make_trainer("out", args={"report_to": "trackio", "project": "of-tests", "run_name": "first"})
trainer.train()
"""


@pytest.mark.slow
def test_trackio_shows_them_too(tmp_path: Path) -> None:
    """The real package, which keeps a run on this machine unless it is given a Space; read back by its own command."""
    pytest.importorskip("trackio", exc_type=ImportError)  # it needs a newer huggingface_hub than the oldest
    env = {**os.environ, "PYTHONPATH": IMPORT_PATH, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    words: dict[str, Any] = {"env": env, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 150}
    done = subprocess.run([sys.executable, "-c", RUN], **words)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-c", "import sys; from trackio.cli import main; sys.exit(main())", "get", "metric"]
    command += ["--project", "of-tests", "--run", "first", "--metric", TAG, "--json"]
    done = subprocess.run(command, **words)
    assert done.returncode == 0, done.stderr
    values = [entry["value"] for entry in json.loads(done.stdout)["values"]]
    assert [value["_type"] for value in values] == ["trackio.image"] * len(DRAWN)
    assert [value["caption"] for value in values][:2] == [
        f"Differential Adaptation Matrix, step {step}, search" for step in DRAWN[:2]
    ]
    assert "modules kept (framed)" in values[-1]["caption"]
    for value in values:
        picture = imread(tmp_path / "trackio" / "media" / value["file_path"])
        assert picture.shape[1] > 300 and picture.std() > 0.05


def test_wandb_is_given_what_its_interface_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb.Image(data_or_path, caption=...)` and `wandb.log(data)`, as W&B documents them; it is not installed."""
    from transformers.integrations.integration_utils import WandbCallback

    logged: list[dict[str, Any]] = []
    wandb = SimpleNamespace(
        Image=lambda data_or_path, caption: SimpleNamespace(data=data_or_path, caption=caption), log=logged.append
    )
    callback = WandbCallback.__new__(WandbCallback)
    callback._wandb, callback._initialized = wandb, True
    for name in ("on_train_begin", "on_train_end", "on_log", "on_save"):
        monkeypatch.setattr(WandbCallback, name, lambda *args, **kwargs: None)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.train()
    assert [entry["train/global_step"] for entry in logged] == DRAWN
    for entry in logged:
        data = entry[TAG].data
        assert data.dtype == np.uint8 and data.shape[2] == 3 and "Differential Adaptation" in entry[TAG].caption
