"""The report of a run: an HTML page of its own, made of the selection and the log."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from diffora_trainer.cli import main
from diffora_trainer.core.grid import Grid
from diffora_trainer.core.selection import Selection
from diffora_trainer.hub.charts import phases
from diffora_trainer.hub.plots import PICTURE_NAME, plot_selection
from diffora_trainer.hub.report import REPORT_NAME, render_report, write_report
from helpers.adapted import make_selection
from helpers.pages import Page, browse
from helpers.trainers import make_trainer


KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OPTIONS = {"method": "diffora", "selection_ratio": 0.5, "selection_scope": "layer", "discretize_at": 0.25}
EVIL = "<img src=x onerror=alert(1)>\"'&</td></table><script>alert(2)</script>"


def of_layers(layers: int, in_ranks: bool = False, **changes: Any) -> Selection:
    """A selection in a model of so many layers: four of seven modules in each, or a rank for all of them."""
    grid = Grid.arrange([(f"model.layers.{i}.{k}", 8, 2048, "lora") for i in range(layers) for k in KINDS])
    numbers = [(index * 7919) % 997 / 997 for index in range(len(grid))]
    ranks = [2 + index % 7 for index in range(len(grid))]
    if not in_ranks:
        for row in range(layers):
            members = range(row * len(KINDS), (row + 1) * len(KINDS))
            best = sorted(members, key=lambda index: -numbers[index])[:4]
            for index in members:
                ranks[index] = 8 if index in best else 0
    fields: dict[str, Any] = {
        "gains": tuple((number - 0.3) * 1e-4 for number in numbers),
        "step": 250,
        "confidence": 0.42,
        "config": OPTIONS,
        "versions": {"torch": "2.13"},
    }
    return Selection(grid, tuple(ranks), tuple(numbers), tuple(numbers), **{**fields, **changes})


def log_of(steps: int, prune: int) -> list[dict[str, float]]:
    log: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        entry: dict[str, float] = {"step": step, "loss": 1 + 2 * math.exp(-step / 300)}
        if steps * 0.05 < step <= steps * 0.2 and step % 4 == 0:
            entry["diffora/arch_loss"] = entry["loss"] + 0.25
        if step == prune:
            entry |= {"diffora/selected_modules": 4.0, "diffora/held_out_loss_after_pruning": 2.125}
        log.append(entry)
        if step % 100 == 0:
            log.append({"step": step, "eval_loss": entry["loss"] + 0.1})
    return [*log, {"step": steps, "train_runtime": 83.0}]


def check_page(source: str, layers: int) -> Page:
    """Whether it is whole, can be read by anyone, needs nothing beside it, and has a row for each layer."""
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>") and page.named("html") == [{"lang": "en"}]
    assert len(page.named("title")) >= 1 and len(page.named("h1")) == 1 and len(page.named("main")) == 1
    for tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form", "a"):
        assert not page.named(tag), tag
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("aria-labelledby", "for"):
            assert set((attributes.get(name) or "").split()) <= set(ids), attributes
    assert "default-src 'none'" in str(page.named("meta")) and "url(" not in source and "@import" not in source
    assert page.captions == len(page.tables)
    grid = page.tables[0]
    body = [row for row in grid if row[0] != "layer"]
    assert len(body) == layers and {len(row) for row in grid} == {len(grid[0])}
    for drawing in page.named("svg"):
        assert drawing.get("aria-hidden") == "true" or (drawing["role"] == "img" and drawing["aria-labelledby"])
    return page


@pytest.mark.parametrize("layers", [30, 80])
@pytest.mark.parametrize("in_ranks", [False, True])
def test_a_page_of_its_own(layers: int, in_ranks: bool, tmp_path: Path) -> None:
    selection = of_layers(layers, in_ranks)
    path = write_report(tmp_path, selection, log_of(1000, 250), 1000, "my-adapter")
    assert path == tmp_path / REPORT_NAME and path.stat().st_size < 200_000
    assert [other.name for other in tmp_path.iterdir()] == [REPORT_NAME]  # and nothing half-written
    page = check_page(path.read_text(encoding="utf-8"), layers)
    assert path.read_text() == render_report(selection, log_of(1000, 250), 1000, "my-adapter")
    assert selection.summary() in page.text and "my-adapter" in page.text and "0.42" in page.text

    # The cells of the grid: what is kept, and the gate and the gain of each module.
    cells = [cell for row in page.tables[0][1 : layers + 1] for cell in row[1:]]
    for cell, rank, gate, gain in zip(cells, selection.ranks, selection.gates, selection.gains, strict=True):
        mark = str(rank) if in_ranks else "✓" if rank else ""
        assert cell == f"{mark}{gate:.2f}" + f"{gain * 1e6:.1f}".replace("-0.0", "0.0")
    assert "in units of 10⁻⁶" in page.text and "agreement of the two halves of this search" in page.text
    rule = "Ranks were given by gate" if in_ranks else "Modules were chosen within each layer by the highest gates;"
    assert rule in page.text and "the gain only decides between equal gates" in page.text
    assert [label["for"] for label in page.named("label")] == ["m-a", "m-b"]

    # What became of each module, in the order of what decided.
    positions = {name: position for position, name in enumerate(selection.ranking(), start=1)}
    rows = page.tables[2][1:]
    listed = selection.ranking() if in_ranks else [n for n in selection.ranking() if n in set(selection.dropped)]
    assert [row[1] for row in rows] == list(listed) and [int(row[0]) for row in rows] == [positions[n] for n in listed]
    assert page.tables[2][0][:5] == ["position", "module", "gate", "gain", "parameters"]
    gates = [float(row[2]) for row in rows]
    assert gates == sorted(gates, reverse=True)
    of_each = zip(selection.gates, selection.gains, selection.ranks, strict=True)
    by_name = dict(zip(selection.modules, of_each, strict=True))
    tips = {str(cell.get("title")) for cell in page.named("td")}
    for row in rows:
        gate, gain, rank = by_name[row[1]]
        assert row[2:5] == [f"{gate:.3f}", f"{gain:.3g}", "16,384"]
        assert f"{row[1]}: position {row[0]} of {len(positions)} by gate" in tips
        assert row[5] == (f"rank {rank} of 8" if in_ranks else row[5])
        assert in_ranks or re.fullmatch(r"position [567] of 7 in its layer, 4 kept", row[5])

    # The phases are those of the schedule, and drawn with the losses.
    table = page.tables[1]
    assert [row[:2] for row in table[1:]] == [
        ["warm-up", "1–50"], ["search", "51–200"], ["fade-out", "201–250"], ["selected", "251–1000"]
    ]  # fmt: skip
    searched = [1 + 2 * math.exp(-step / 300) for step in range(51, 201)]
    assert float(table[2][2]) == pytest.approx(sum(searched) / 150, abs=0.03)  # of means of three steps
    (drawing,) = [d for d in page.named("svg") if d.get("role") == "img"]
    lines = [a["class"] for a in page.named("path") if "line" in str(a.get("class")) and len(str(a["d"])) > 20]
    assert drawing and {"line train", "line arch", "line eval"} <= set(lines)
    assert len([a for a in page.named("rect") if "band" in str(a["class"])]) == 4
    assert "2.1250" in page.text and "83 s" in page.text


def test_what_is_written_is_data() -> None:
    """Names, notes, options and versions from anywhere are shown as they are, and nothing of them is markup."""
    grid = Grid.arrange([(f"layers.{i}.{name}", 4, 10, "lora") for i in range(2) for name in ("q", f"v{EVIL}")])
    changes: dict[str, Any] = {"notes": (f"note {EVIL}",), "versions": {f"lib{EVIL}": EVIL}}
    hostile = Selection(grid, (4, 0, 4, 0), (1.0, 0.5, 1.0, 0.25), (1.0, 0.5, 1.0, 0.25), **changes)
    hostile = replace(hostile, config={f"option{EVIL}": f"value{EVIL}"})
    plain = Selection.from_json(hostile.to_json().replace(EVIL.replace('"', '\\"'), "plain"))
    assert plain != hostile
    log = [{"step": 1, "loss": 1.0, f"eval_{EVIL}_loss": 2.0, "diffora/selected_modules": 2.0}]
    page = check_page(render_report(hostile, log, 2, f"title {EVIL}"), 2)
    other = check_page(render_report(plain, [{k.replace(EVIL, "x"): v for k, v in log[0].items()}], 2, "title"), 2)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in other.elements]
    for start in ("note ", "title ", "lib", "option", "value", "layers.0.v"):
        assert start + EVIL in page.text, start


def test_no_token_in_a_page() -> None:
    token = "hf_" + "A1b2" * 8
    source = render_report(make_selection(notes=(f"read with {token}",)), title=token)
    assert token not in source and source.count("&lt;HUB_TOKEN&gt;") == 3  # in both titles and the note
    check_page(source, 3)


def test_phases() -> None:
    """From the options, the length and the step of the pruning: as planned, earlier, and where little is known."""

    def found(selection: Selection, steps: int | None, made: int | None = None) -> list[tuple[str, int, int]]:
        log = [] if made is None else [{"step": made, "loss": 1.0}]
        return [(phase.name, phase.begin, phase.end) for phase in phases(selection, log, steps)]

    planned = of_layers(2)
    assert found(planned, 1000)[2:] == [("fade-out", 200, 250), ("selected", 250, 1000)]
    early = replace(planned, step=150, config={**OPTIONS, "decide_early": True})
    assert found(early, 1000, 1000) == [
        ("warm-up", 0, 50), ("search", 50, 100), ("fade-out", 100, 150), ("selected", 150, 1000)
    ]  # fmt: skip
    for selection, step in ((planned, 60), (planned, 220), (early, 60)):  # ended there, and chosen then
        stopped = [("warm-up", 0, 50), ("search", 50, min(step, 200)), ("fade-out", 200, step)][: 2 + (step > 200)]
        assert found(replace(selection, step=step), 1000, step) == stopped
    assert found(planned, 1000, 400)[-1] == ("selected", 250, 400)  # so far
    assert found(planned, None, 1000) == found(planned, 1000, 1000) == found(planned, 1000)
    once = replace(planned, config={"method": "snip", "discretize_at": 250})
    assert found(once, 1000) == [("warm-up", 0, 250), ("selected", 250, 1000)]
    at_once = replace(planned, config={"method": "snip", "discretize_at": 0}, step=0)
    assert found(at_once, 10) == [("selected", 0, 10)]
    assert found(planned, None) == found(replace(planned, config={"method": "no such one"}), None)
    assert found(planned, None) == [("all modules", 0, 250)] and found(replace(planned, step=None), 10) == []


def test_why_a_module_was_removed() -> None:
    """Its position among those that it competes with; and where a limit has left it out, which one."""
    selection = of_layers(3)
    of_model = replace(selection, config={**OPTIONS, "selection_scope": "model"})
    kept = len(selection.selected)
    worst = len(selection.modules)
    text = Page(render_report(of_model)).text
    assert f"position {worst} of {worst} in the model, {kept} kept" in text and "bound by more than this" in text
    assert "chosen in the whole model by the highest gates;" in text
    timed = replace(selection, config={**OPTIONS, "max_step_time": 0.7, "selection_ratio": None})
    text = Page(render_report(timed)).text
    assert "further down the list: also bound by `max_step_time`" in text
    assert "within `max_step_time`" in text and "between sets of modules that begin at different layers" in text
    assert "further down" not in Page(render_report(selection)).text
    control = Page(render_report(replace(selection, config={**OPTIONS, "method": "random", "method_options": {}})))
    assert "at random; position" in control.text and "Modules were chosen at random" in control.text
    shared = make_selection(shared=(("layers.1.attn.q", "layers.0.attn.v"),))
    page = Page(render_report(shared))
    assert [row[-1] for row in page.tables[-2] if row[1] == "layers.0.attn.v"][0].startswith(
        "shares the pair of layers.1"
    )
    assert [cell[0] for row in page.tables[0] for cell in row[1:] if cell[:1] == "s"] == ["s", "s"]


def test_time_and_memory_as_predicted_and_measured() -> None:
    times = {"all_modules": 0.8, "predicted": 0.5, "before_pruning": 0.8, "after_pruning": 0.52}
    memory = {"all_modules": 800 * 2.0**20, "predicted": 600 * 2.0**20}
    page = Page(render_report(of_layers(2, times=times, memory=memory), log_of(100, 25), 100))
    assert page.tables[2][1:] == [
        ["time of a step", "0.8 s", "0.5 s (0.62)", "0.52 s (0.65)"],
        ["memory of a step, beside the model", "800 MiB", "600 MiB (0.75)", "–"],
    ]
    assert "no limit on the time" in Page(render_report(of_layers(2))).text


def test_the_log_of_an_earlier_version_is_read() -> None:
    """The held-out losses around the pruning had other names in version 0.1."""
    log = log_of(1000, 250)
    for entry in log:
        if entry["step"] == 200:
            entry["diffora/held_out_loss_before_fade_out"] = 2.25
        if entry["step"] == 250:
            entry["diffora/held_out_loss_before_pruning"] = 2.5
    new = {"before_fade_out": "before_closing", "before_pruning": "before_cut", "after_pruning": "after_cut"}
    old = [{re.sub("before_fade_out|(before|after)_pruning", lambda m: new[m[0]], k): e[k] for k in e} for e in log]
    page = render_report(of_layers(2), old, 1000)
    assert old != log and page == render_report(of_layers(2), log, 1000)
    assert "2.2500 before the fade-out" in page


def test_logs_of_any_kind() -> None:
    """Values that are not finite are counted, long logs are thinned, and the log of another training is left out."""
    selection = of_layers(2)
    log = log_of(1000, 250)
    entry = {"diffora/selected_modules": 4.0}
    broken = [{**line, "loss": float("nan")} if line["step"] == 7 and "loss" in line else line for line in log]
    page = check_page(render_report(selection, [*broken, {"step": 999, "loss": "no number"}], 1000), 2)
    assert "2 value(s) that are not finite are left out" in page.text
    other = [{key: value for key, value in entry.items() if key != "diffora/selected_modules"} for entry in log]
    page = check_page(render_report(selection, other, 1000), 2)
    assert "so it has no losses" in page.text and not [d for d in page.named("svg") if d.get("role")]
    long = [{"step": step, "loss": 2.0 + (step > 250)} for step in range(1, 50_001)]
    long[249]["diffora/selected_modules"] = 4.0
    source = render_report(selection, long, 50_000)
    assert len(source) < 40_000
    # No mean is taken over the step of the pruning: there are two heights and nothing in between.
    (path,) = [
        a["d"] for a in check_page(source, 2).named("path") if a.get("class") == "line train" and len(a["d"]) > 20
    ]
    assert len({point.split()[1] for point in path[1:].split("L")}) == 2
    odd = [{"step": 0, "loss": loss, **entry} for loss in (5e-324, 1e29, -1e29, 10**400, "1", None, True, [1])]
    odd += [{f"eval_{name}_loss": 1.0, "step": 10**18, **entry} for name in "abcdefg"]
    page = check_page(render_report(replace(selection, gains=(5e-324,) * len(selection.grid)), odd, 10**40), 2)
    assert "4 value(s) that are not finite" in page.text and "2 more evaluation losses" in page.text
    constant = [{"step": 1, "loss": 0.0, "diffora/selected_modules": 4.0}]
    check_page(render_report(replace(selection, step=1), constant), 2)


def test_scores_and_choices_made_anew() -> None:
    """
    Of a method that scores the scores are shown, also of a search whose gates are made from scores, and of one that
    chose again how often each module was on.
    """
    selection = of_layers(2, config={**OPTIONS, "method": "snip", "method_options": {}})
    page = check_page(render_report(selection), 2)
    assert "scored its modules by snip" in page.text and len(page.named("label")) == 1
    assert "chosen within each layer by the highest scores." in page.text and page.tables[2][0][2:4] == [
        "score",
        "parameters",
    ]
    logits = tuple(4 * gate - 2 for gate in selection.gates)
    drawn = replace(selection, scores=logits, gains=logits, config={**OPTIONS, "method": "sampled"})
    page = check_page(render_report(drawn), 2)
    assert page.tables[2][0][2:4] == ["score", "gate"] and "by the highest scores." in page.text
    ranks = replace(of_layers(2, in_ranks=True), config={**OPTIONS, "method": "adalora", "method_options": {}})
    assert "Components were chosen by scores of their own" in Page(render_report(ranks)).text
    single = replace(of_layers(2, in_ranks=True), config={**OPTIONS, "selection_granularity": "component"})
    assert "Components were chosen by gates of their own and new ones" in Page(render_report(single)).text
    on = tuple(rank > 0 for rank in selection.ranks)
    from diffora_trainer.core.allocation import Allocation

    entries = (Allocation(10, selection.scores, on), Allocation(20, selection.scores, tuple(not bit for bit in on)))
    page = check_page(render_report(replace(selection, history=entries)), 2)
    assert [a["for"] for a in page.named("label")] == ["m-a", "m-b"] and "0.50" in page.tables[0][1][1]
    assert "chosen anew several times" in page.text


def test_a_run_writes_it_and_the_command_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The trainer's report has its losses; the command finds them in a checkpoint, and loses none in silence."""
    out = tmp_path / "my-run"
    trainer = make_trainer(out, "sft", args={"save_strategy": "steps", "save_steps": 6, "run_name": str(tmp_path)})
    trainer.train()
    trainer.save_model()
    report = out / REPORT_NAME
    source = report.read_text()
    page = check_page(source, 2)
    assert "my-run" in page.text and str(tmp_path) not in source
    assert [row[:2] for row in page.tables[1][1:]] == [["warm-up", "1–3"], ["search", "4–8"], ["selected", "9–12"]]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert page.tables[1][3][2] == f"{sum(losses[8:]) / 4:.4f}"
    assert f"[`{REPORT_NAME}`]({REPORT_NAME})" in (out / "README.md").read_text()
    assert (out / "checkpoint-12" / REPORT_NAME).is_file() and not (out / "checkpoint-6" / REPORT_NAME).exists()

    report.unlink()
    assert main(["report", str(out)]) == 0
    again = Page(report.read_text())
    assert again.tables[1] == page.tables[1] and "without losses" not in capsys.readouterr().out
    assert main(["report", str(out), "--output", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == report.read_text()

    # A training that goes on with the chosen modules has another log: the report keeps that of the choice.
    trainer.train()
    trainer.save_model()
    assert Page(report.read_text()).tables[1] == page.tables[1]

    state = out / "checkpoint-12" / "trainer_state.json"
    state.write_text('{"log_history": [3]}')
    assert main(["report", str(out)]) == 1
    assert "`log_history` is not a list of objects" in capsys.readouterr().err
    state.unlink()
    assert main(["report", str(out)]) == 1
    assert "would have no losses" in capsys.readouterr().err and Page(report.read_text()).tables[1] == page.tables[1]
    assert main(["report", str(out), "--output", str(tmp_path)]) == 0
    assert "(without losses" in capsys.readouterr().out
    assert "so it has no losses" in Page((tmp_path / REPORT_NAME).read_text()).text


@pytest.mark.parametrize("layers", [30, 80])
def test_in_a_browser(layers: int, tmp_path: Path) -> None:
    """Chromium shows the grid, asks for nothing and complains of nothing; of a page that asks, it is seen."""
    path = tmp_path / "page.html"
    selection = of_layers(layers, notes=(EVIL,))
    source = render_report(selection, log_of(1000, 250), 1000, "my-adapter")
    path.write_text(source, encoding="utf-8")
    shown, complaints, asked = browse(path, tmp_path / "profile")
    assert not complaints and not asked
    assert len(re.findall(r'<tr><th scope="row">\d+</th>', shown)) == layers
    assert shown.count("✓") == len(selection.selected) + 1 and 'checked=""' in shown  # and in the caption
    if layers == 30:
        spy = '<img src="http://diffora.example/spy.png">'
        path.write_text(source.replace("<main>", f"<main>{spy}"), encoding="utf-8")
        _, complaints, asked = browse(path, tmp_path / "profile")
        assert "Content Security Policy" in complaints[0] and not asked
        path.write_text(f"<p>{spy}", encoding="utf-8")
        _, _, asked = browse(path, tmp_path / "profile")
        assert [name for name in asked if "diffora.example" in name]


@pytest.mark.parametrize("layers", [30, 80])
def test_the_picture_is_legible_at_half_of_its_size(layers: int, tmp_path: Path) -> None:
    """Shown 360 pixels wide, as the README does it, each row has 4 pixels or more; and ranks are no frames."""
    framed = imread(plot_selection(of_layers(layers), tmp_path / PICTURE_NAME))
    height, width = framed.shape[:2]
    assert 600 <= width <= 800 and height * 360 / width / (layers + 15) > 8
    numbered = imread(plot_selection(of_layers(layers, in_ranks=True), tmp_path / "ranks.png"))
    orange = [((p[..., 0] > 0.85) & (p[..., 1] < 0.5) & (p[..., 2] < 0.3)).mean() for p in (framed, numbered)]
    assert orange[0] > 0.02 and orange[1] == 0


def test_a_long_common_name_of_few_layers_leaves_the_title_alone(tmp_path: Path) -> None:
    def picture(prefix: str) -> Any:
        grid = Grid.arrange([(f"{prefix}.{i}.{k}", 8, 2048, "lora") for i in range(3) for k in KINDS])
        shades = tuple(index / len(grid) for index in range(len(grid)))
        return imread(plot_selection(Selection(grid, (8,) * len(grid), shades, shades), tmp_path / PICTURE_NAME))

    short, long = picture("layers"), picture("encoder.block_of_a_long_prefix.model.layers")
    title = slice(0, round(0.3 * 200))  # the first of its inches, at 200 dots
    assert short.shape == long.shape and (short[title] < 0.5).any()
    assert (short[title] == long[title]).all() and not (short == long).all()
