"""Recipes, overrides and the errors a user meets."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megagrin.cli import main
from megagrin.distributed.runtime import RuntimeConfig, session
from megagrin.models.grin import PRESETS
from megagrin.settings import config
from megagrin.training import rules
from megagrin.training.run_config import RunConfig, describe, parse_config

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


def parse(*argv: str) -> RunConfig:
    """The configuration of these arguments."""
    return parse_config(list(argv))[0]


def test_later_sources_win(tmp_path: Path) -> None:
    """Defaults < preset < recipes in order < overrides."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: {preset: grin_16x0_9b, n_layers: 3}\ntrain: {steps: 7}\n")
    second.write_text("train: {steps: 9}\n")
    run = parse("--config", str(first), "--config", str(second), "--model.d_ff=100")
    assert run.model.preset == "grin_16x0_9b (changed)"
    assert (run.model.n_layers, run.train.steps, run.model.d_ff) == (3, 9, 100)
    assert run.model.d_model == PRESETS["grin_16x0_9b"].d_model


def test_the_command_line_wins_wherever_it_stands(tmp_path: Path) -> None:
    """An override before --config, too; among recipes the later one; among equal overrides the last one."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {steps: 9, seq_len: 5}\nengine: {kind: native}\n")
    run = parse("--train.steps", "2", "--engine=deepspeed", "--config", str(recipe), "--train.seed=1", "--train.seed", "3")
    assert (run.train.steps, run.train.seq_len, run.train.seed, run.engine.kind) == (2, 5, 3, "deepspeed")


def test_a_preset_lends_its_name_to_its_own_shape_only(tmp_path: Path) -> None:
    """The preset of the highest source, then explicit fields; another shape than the preset's says so, and reads back."""
    dense, moe = tmp_path / "dense.yaml", tmp_path / "moe.yaml"
    dense.write_text("model: {preset: dense_tiny}\n")
    moe.write_text("model: {preset: grin_16x0_9b, n_layers: 3}\n")
    assert parse("--model.preset", "grin_tiny", "--config", str(dense)).model == PRESETS["grin_tiny"]
    assert parse("--config", str(dense), "--model.preset=grin_tiny").model == PRESETS["grin_tiny"]
    assert parse("--config", str(moe), "--config", str(dense)).model == replace(
        PRESETS["dense_tiny"], n_layers=3, preset="dense_tiny (changed)"
    )
    assert parse("--model.n_experts=8").model == replace(PRESETS["grin_tiny"], n_experts=8, preset="grin_tiny (changed)")
    changed = parse("--model.d_ff=100")
    assert "grin_tiny (changed): " in describe(changed, 1)
    config.save(changed, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == changed
    assert parse("--config", str(tmp_path / "config.yaml"), "--model.d_ff=192").model == PRESETS["grin_tiny"]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (["--model.preset=grin_tiny"], "12.35M parameters"),
        (["--model.preset=grin_16x3_8b"], "41.87B parameters, 6.641B active"),
        (["--model.d_model=1000000", "--model.n_experts=100000"], "230.8T parameters"),
    ],
)
def test_sizes_have_a_sensible_unit(settings: list[str], sizes: str) -> None:
    """Millions, thousands of millions, and beyond."""
    assert sizes in describe(parse(*settings), 1)


def test_a_run_in_a_few_lines() -> None:
    """pp 2 and tp 2 of 16 ranks leave dp 4; 64 sequences are 4 micro-batches of 4 a rank; 1F1B on 2 stages waits a quarter."""
    sizes = ["--train.steps=1000", "--train.seq_len=128", "--train.global_batch_size=64", "--train.micro_batch_size=4"]
    layout = ["--parallel.pp=2", "--parallel.tp=2", "--parallel.ep=4"]
    assert describe(parse(*sizes, *layout), 16).splitlines() == [
        "model    grin_tiny: 12.35M parameters, 4.091M active per token",
        "layout   16 ranks: pp 2 × dp 4 × tp 2; experts edp 2 × ep 4",
        "batch    8,192 tokens: 64 sequences of 128, 4 micro-batches a rank",
        "length   1,000 steps, 8,192,000 tokens",
        "pipeline 1f1b: embed, 0-2 | 3, head; waiting 25% of the working time",
    ]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets(preset: str) -> None:
    """A preset alone gives exactly its values."""
    assert parse(f"--model.preset={preset}").model == PRESETS[preset]
    assert not PRESETS[preset].violations()


def test_saved_configuration_reads_back(tmp_path: Path) -> None:
    """config.yaml of a run gives the same configuration."""
    run = parse("--model.preset=dense_1_6b", "--model.n_layers=5", "--optim.lr=1e-3", "--data.train=x")
    config.save(run, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == run


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_fit(recipe: Path) -> None:
    """Every recipe parses and breaks no rule on the ranks that its name says; the quickstart has two."""
    run = parse("--config", str(recipe), "--data.train=tokens")
    ranks = re.search(r"_(\d+)gpu", recipe.stem)
    assert rules.violations(run, int(ranks[1]) if ranks else 2) == []


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--model.n_layer=3", "model.n_layer: no such key (command line); did you mean model.n_layers?"),
        ("--optim.learning_rate=3", "optim.learning_rate: no such key (command line)"),
        ("--seq_len=3", "seq_len: no such key (command line); did you mean train.seq_len?"),
        ("--model.seed=3", "did you mean train.seed?"),
    ],
)
def test_misspelt_argument(argument: str, hint: str) -> None:
    """The nearest right key is named."""
    with pytest.raises(ValueError, match="no such key") as error:
        parse(argument)
    assert hint in str(error.value)


def test_misspelt_key_in_recipe(tmp_path: Path) -> None:
    """So in a file, which is named."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {global_batchsize: 4}\n")
    with pytest.raises(
        ValueError, match=r"train\.global_batchsize: no such key \(.*r\.yaml\); did you mean train\.global_batch_size"
    ):
        parse("--config", str(recipe))


@pytest.mark.parametrize(
    ("text", "message"),
    [("train: [", "not valid YAML"), ("- 1", "must hold sections"), ("train: {steps: many}", "train.steps")],
)
def test_bad_recipe(tmp_path: Path, text: str, message: str) -> None:
    """Unreadable recipes are errors of use, in one line."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as error:
        parse("--config", str(recipe))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 5, steps: 6}", "line 1: train.steps was given before, on line 1"),
        ("train: {steps: 5}\noptim: {lr: 1}\ntrain: {seed: 6}\n", "line 3: train was given before, on line 1"),
        ("train:\n  steps: 5\ntrain.steps: 6\n", "line 3: train.steps was given before, on line 2"),
        ("train: &a\n  steps: *a\n", "train.steps: {'steps': {'steps': {...}}} must be an integer"),
        ("[" * 5000, "has a value that contains itself (by an anchor), or is nested too deeply"),
        ("a: &a\n  <<: *a\n", "a: no such key"),
        ("train: [1]", "train: [1] must be a section of keys"),
        ("train: 5", "train: 5 must be a section of keys"),
        ("", "holds no settings"),
        ("# nothing\n", "holds no settings"),
        ("train: {steps: x}", "train.steps: 'x' must be an integer"),
        ("train: {steps: 2.5}", "train.steps: 2.5 must be an integer"),
        ("train: {run_dir: 5}", "train.run_dir: 5 must be text"),
        ("data: {shuffle: 1}", "data.shuffle: 1 must be true or false"),
        ("model: {window: null}", "model.window: null must be an integer"),
        ("metrics: {wandb: off}", "metrics.wandb: false must be one of disabled, offline, online"),
        ("parallel: {pp_split: [1, x]}", "parallel.pp_split: [1, 'x'] holds 'x', and each item must be an integer"),
        ("dry_run: true", "dry_run: no such key"),
        ("a: !!timestamp x", "is not valid YAML"),
        ("train: {seed: " + "9" * 5000 + "}", "is not valid YAML"),
    ],
)
def test_what_a_recipe_may_not_say(tmp_path: Path, text: str, message: str) -> None:
    """Each in one line that names the file or the key, in a user's words."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse("--config", str(recipe))
    assert "\n" not in str(error.value)


def test_merged_keys_are_no_duplicates(tmp_path: Path) -> None:
    """YAML's own `<<` gives defaults that the section's keys override."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: &t {steps: 5, seed: 2}\noptim: {lr: 1e-3}\n")
    other = tmp_path / "s.yaml"
    other.write_text("train:\n  <<: {steps: 7, seed: 4}\n  seed: 6\n")
    run = parse("--config", str(recipe), "--config", str(other))
    assert (run.train.steps, run.train.seed, run.optim.lr) == (7, 6, 1e-3)


def test_several_wrong_keys_and_values_at_once(tmp_path: Path) -> None:
    """Unknown keys and wrong types of all sources; a value that a later source corrects is none."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {steps: x, seed: y, stps: 3}\n")
    with pytest.raises(ValueError, match="5 settings do not fit") as error:
        parse("--config", str(recipe), "--train.seed=1", "--optim.lr=fast", "--dat.train=a", "--optim.lt=1")
    for part in (
        "dat.train: no such key",
        "train.stps: no such key",
        "train.steps: 'x'",
        "optim.lr: 'fast' must be a number",
        "optim.lt: no such key",
    ):
        assert part in str(error.value)


def test_missing_recipe_and_preset() -> None:
    """Both are named."""
    with pytest.raises(ValueError, match=r"nowhere\.yaml is not a file"):
        parse("--config", "nowhere.yaml")
    with pytest.raises(ValueError, match=r"model\.preset: grin is none of .*grin_16x3_8b"):
        parse("--model.preset=grin")


def test_all_violations_at_once() -> None:
    """Heads, top_k, batch, layout, sequence length, forced balance and data together."""
    run = parse(
        "--model.n_heads=6",
        "--model.n_kv_heads=4",
        "--model.top_k=17",
        "--model.head_dim=7",
        "--train.global_batch_size=9",
        "--train.seq_len=4096",
        "--parallel.ep=3",
        "--router.forced_balance=true",
        "--optim.beta2=1.5",
        "--metrics.log_interval=0",
    )
    broken = "\n".join(rules.violations(run, 4))
    for rule in (
        "model.n_heads: 6 must be a multiple of model.n_kv_heads (4)",
        "model.top_k: 17 must lie in [1, model.n_experts = 16]",
        "model.head_dim: 7 must be even",
        "train.global_batch_size: 9 must be a multiple of data-parallel ranks × train.micro_batch_size (4 × 4)",
        "train.seq_len: 4096 must not exceed model.max_positions (1024)",
        "parallel.ep: 3 must divide the number of ranks (4)",
        "parallel.ep: 3 must divide model.n_experts (16)",
        "router.forced_balance: true",
        "optim.beta2: 1.5 must lie in [0, 1)",
        "metrics.log_interval: 0 must be at least 1",
        "data.train: the prefix",
    ):
        assert rule in broken
    assert len(rules.violations(run, 4)) == 11
    with pytest.raises(ValueError, match="11 settings do not fit"):
        config.check(rules.violations(run, 4))


def test_forced_balance_by_name() -> None:
    """Asked for by name it is accepted."""
    run = parse("--router.forced_balance=true", "--train.allow_forced_balance=true", "--data.train=x")
    assert rules.violations(run, 1) == []


def test_command_line_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr and exit code 2; a traceback only with --debug."""
    assert main(["train", "--model.n_layer=3"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("megagrin: error: model.n_layer: no such key")
    assert captured.err.count("\n") == 1
    assert main(["train", "--model.n_layer=3", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["plot", "--run", "nowhere"]) == 2
    assert capsys.readouterr().err == "megagrin: error: --run: nowhere/metrics.jsonl: No such file or directory\n"
    assert main(["trian"]) == 2
    assert "trian: no such command" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


def test_world_size_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any process group is joined; only rank 0 speaks."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", "--data.train=x", "--parallel.ep=2", "--train.global_batch_size=12"]) == 2
    assert "parallel.ep: 2 must divide the number of ranks (3)" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--data.train=x", "--parallel.ep=2"]) == 2
    assert capsys.readouterr().err == ""


def test_print_config_is_complete_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    """--print_config shows every section as a recipe."""
    with pytest.raises(SystemExit) as stop:
        main(["train", "--dry_run", "--model.preset=grin_16x3_8b", "--print_config"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["n_layers"] == 32
    assert "dry_run" not in shown
    assert set(shown) >= {"train", "model", "router", "balance", "data", "optim", "parallel", "engine", "checkpoint", "metrics"}


def test_an_error_of_one_rank_is_said_by_that_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Once the process group is joined, an error carries its rank and is printed there: other ranks may not have it."""
    with pytest.raises(OSError, match="disk full") as caught, session(RuntimeConfig(device="cpu")):
        raise OSError("disk full")
    assert caught.value.__notes__ == ["rank 0"]

    def fails(_: list[str]) -> int:
        error = OSError("disk full")
        error.add_note("rank 1")
        raise error

    monkeypatch.setattr("megagrin.training.loop.main", fails)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "megagrin: error: rank 1: disk full\n"


@pytest.mark.parametrize("null", ["null", "~"])
def test_null_where_it_is_a_value(null: str) -> None:
    """As YAML writes it."""
    assert parse("--data.valid=a", f"--data.valid={null}").data.valid is None


def test_null_for_a_number(tmp_path: Path) -> None:
    """Named by key, in a file as on the command line."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {window: null}\n")
    for source in (["--config", str(recipe)], ["--model.window=null"]):
        with pytest.raises(ValueError, match=r"model\.window"):
            parse(*source)
