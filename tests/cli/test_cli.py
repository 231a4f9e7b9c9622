"""The command: words in, exit codes out, one line for what is wrong."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apollo_optim import list_optimizers
from apollo_optim.cli import pretrain, sample
from apollo_optim.cli.main import COMMANDS, main
from apollo_optim.core.errors import InputError, nearest
from apollo_optim.train.config import RunConfig, check, from_dict, key_types

TINY = [
    "--model.name=llama-1m",
    "--train.steps=3",
    "--train.batch_size=2",
    "--train.threads=1",
    "--data.seq_len=16",
    "--data.vocab_size=300",
    "--eval.tokens=64",
    "--log.every=1",
    "--log.display=plain",
]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from apollo_optim.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'jsonargparse', 'matplotlib'} & set(sys.modules)\n"
        "print(*heavy)"
    )
    words = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    *text, heavy = words.splitlines()
    assert not heavy
    assert all(any(line.strip().startswith(name) for line in text) for name in COMMANDS)


def test_the_package_is_the_command_too() -> None:
    words = [sys.executable, "-m", "apollo_optim", "--version"]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout.startswith("apollo-optim 0.")


def test_env_says_what_a_bug_report_needs_and_not_who_or_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    for what in ("apollo-optim", "python", "system", "torch", "processor", "C++ compiler"):
        assert re.search(rf"^{re.escape(what)} +\S", said, re.MULTILINE)
    assert platform.node() not in said
    assert str(Path.home()) not in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("apollo-optim 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pretran", "unknown command pretran (did you mean pretrain?)"),
        ("zzz", "unknown command zzz; there are pretrain, finetune, data, plan, optimizers"),
        ("bench sped", "unknown bench sped; there are race, "),
        ("report --otu x DIR", "unknown argument --otu (did you mean --out?)"),
        ("report", "required: DIR"),
        ("report nowhere", "nowhere: no metrics.jsonl there"),
        ("sample nowhere", "nowhere: there is no such directory"),
        ("sample DIR --max-tokens 0", "--max-tokens 0: at least 1"),
        ("sample DIR --temperature -1", "--temperature -1.0: 0 or more"),
        ("sample DIR --seed x", "argument --seed: invalid int value: 'x'"),
        ("export nowhere", "nowhere holds no checkpoint"),
        ("optimizers all", "unknown argument all"),
        ("pretrain --optim.lrr 3", "unknown key --optim.lrr (did you mean --optim.lr?)"),
        ("pretrain --model llama-1m", "unknown key --model (did you mean --model.name?)"),
        ("pretrain --optim.lr much", "optim.lr=much: expected float | null"),
        ("pretrain --train.steps 3.5", "train.steps=3.5: expected int"),
        ("pretrain --schedule.kind cosin", "schedule.kind=cosin: expected Literal['cosine', 'linear', "),
        ("pretrain --config nowhere.yaml", "cannot read the run file nowhere.yaml"),
        ("pretrain --config", "argument --config: expected one argument"),
        ("pretrain llama-60m", "llama-60m"),
        ("pretrain --out nowhere --resume", "--out nowhere: there is no such directory, so no run to resume"),
        ("pretrain --lr 3", "unknown key --lr (did you mean --optim.lr?)"),
        ("pretrain --batch_size 3", "(did you mean --train.batch_size or --eval.batch_size?)"),
    ],
)
def test_wrong_words_get_one_line_and_exit_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 3}", "unknown key optim.lrr (did you mean optim.lr?)"),
        ("optm: {lr: 3}", "unknown key optm (did you mean optim?)"),
        ("optim: {lr: much}", "run.yaml: optim.lr=much: expected float | null"),
        ("log: {display: loud}", "log.display=loud: expected Literal"),
        ("model: {}\ntrain: {steps: [", "run.yaml, line 2, is not a YAML run file"),
        ("- a\n- b", "is not a run file"),
        ("model: !!python/object/apply:os.getcwd []", "is not a YAML run file"),
    ],
)
def test_a_wrong_run_file_is_told_in_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["pretrain", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_mistyped_directory_is_told_apart_from_one_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("out/llama-60m", "out/other", "out/empty"):
        (tmp_path / name).mkdir(parents=True)
    for name, message in (
        ("out/empty", "/out/empty: holds no run to resume; leave --resume out"),
        ("out/lama-60m", "/out/lama-60m: there is no such directory, so no run to resume"),
    ):
        assert main(["pretrain", "--resume", "--out", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    for name in ("out/llama-60m", "out/other"):
        (tmp_path / name / "config.yaml").touch()
    for name, hint in (
        ("out/lama-60m", f"(did you mean {tmp_path}/out/llama-60m?)"),
        ("uot/llama-60m", f"(did you mean {tmp_path}/out/llama-60m?)"),
    ):
        assert main(["pretrain", "--resume", "--out", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert hint in error
        assert error.count("\n") == 1


def test_words_change_the_run_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim: {name: apollo, lr: 1e-3, betas: [0.9, 0.95]}\nmodel: {config: {rope_theta: 5.0}}\n")
    words = ["--config", str(path), "--optim.lr", "3e-4", "--optim.targets", "[attn]", "--optim.scale", "auto"]
    cfg, resume, _ = pretrain.parse([*words, "--model.config.rms_norm_eps", "1e-5", "--eval.every", "null"])
    assert (cfg.optim.name, cfg.optim.lr, cfg.optim.targets) == ("apollo", 3e-4, ["attn"])
    assert (cfg.optim.knobs, cfg.eval.every, resume) == ({"betas": (0.9, 0.95), "scale": "auto"}, None, False)
    assert cfg.model.config == {"rope_theta": 5.0, "rms_norm_eps": 1e-5}
    assert pretrain.parse([])[0] == RunConfig()


def test_targets_may_be_one_word() -> None:
    """As the library takes them, and as its errors recommend."""
    for words, targets in (("all-linear", "all-linear"), ("[attn, mlp]", ["attn", "mlp"])):
        assert pretrain.parse(["--optim.targets", words]).cfg.optim.targets == targets
    assert pretrain.parse(["--quant.bits", "8", "--quant.targets", "mlp"]).cfg.quant.targets == "mlp"


def test_every_knob_of_every_rule_is_a_key(tmp_path: Path) -> None:
    """Without a line written by hand: as the rule's default, it is what the rule has."""
    path = tmp_path / "run.yaml"
    for info in list_optimizers():
        knobs = {key: value for key, value in info.cls.defaults().items() if value is not None}
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in knobs.items()}
        path.write_text(yaml.safe_dump({"optim": {"name": info.name, **given}}))
        cfg = pretrain.parse(["--config", str(path)]).cfg
        check(cfg)
        assert cfg.optim.knobs == knobs
        words = [word for key, value in given.items() for word in (f"--optim.{key}", json.dumps(value).strip('"'))]
        assert pretrain.parse(["--optim.name", info.name, *words]).cfg == cfg


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim.name muon --optim.momentm 0.9", "(did you mean --optim.momentum?)"),
        ("--optim.name muon --optim.momentum 1.5", "momentum=1.5, but it must be a number in [0, 1)"),
        ("--optim.name muon --optim.momentum fast", "momentum='fast', but it must be a number in [0, 1)"),
        (
            "--optim.name muon --optim.proj svd",
            "unknown key 'proj'. It is a key of apollo, apollo-mini, apollo-svd",
        ),
        ("--optim.name mouon+adamw", "no optimizer is called 'mouon' (in 'mouon+adamw'). Did you mean 'muon'?"),
        ("--optim.name muon+adamv", "no rule is called 'adamv'. Did you mean 'adamw'?"),
        ("--optim.rest adamv", "no rule is called 'adamv'. Did you mean 'adamw'?"),
        ("--optim.state_dtype 9bit", "state_dtype='9bit', but it must be"),
        ("--optim.knobs {}", "unknown key --optim.knobs"),
    ],
)
def test_a_knob_is_judged_by_its_rule(words: str, message: str) -> None:
    """In the library's words, before anything is read or made."""
    with pytest.raises(InputError) as error:
        check(pretrain.parse(words.split()).cfg)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_run_files_of_old_say_null_for_what_is_not_theirs() -> None:
    old = {"name": "adamw", "lr": 1e-3, "rank": None, "scale": None, "proj": None, "betas": None, "eps": "1e-6"}
    cfg = from_dict({"optim": old, "train": None})
    assert (cfg.optim.lr, cfg.optim.knobs) == (1e-3, {"eps": 1e-6})
    check(cfg)
    for wrong, message in (
        ({"optim": {"momentum": {"class_path": "os.system"}}}, "optim.momentum="),
        ({"train": {"steps": None}}, "train.steps: a value is missing"),
        ({"optim": {"momentm": 1}}, r"unknown key optim.momentm \(did you mean optim.momentum\?\)"),
    ):
        with pytest.raises(InputError, match=message):
            from_dict(wrong)


def test_help_teaches_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in key_types():
        assert f"--{key} " in text or f"--{key}," in text, key
    assert "Peak learning rate of the matrices" in text
    assert "muon, normuon, swan: Newton-Schulz steps. (a whole number >= 1;" in " ".join(text.split())
    assert "--config runs/llama-60m-apollo.yaml" in text


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["pretrain"]) == 2
    assert "jsonargparse, which is not installed: pip install 'apollo-optim[train]'" in capsys.readouterr().err


def test_a_failed_run_exits_1_and_an_interrupted_one_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from apollo_optim.train import failures as ended
    from apollo_optim.train import pretrain as story

    failures = {ended.TrainingFailed("step 7: NaN"): 1, ended.Interrupted("go on with"): 130, OSError(28, "full"): 1}
    for error, code in failures.items():

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(story, "pretrain", fail)
        assert main(["pretrain"]) == code
        assert str(error.args[-1]) in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from apollo_optim.train import pretrain as story

    def bug(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(story, "pretrain", bug)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["pretrain"])


def test_optimizers_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimizers"]) == 0
    text = capsys.readouterr().out
    assert all(info.name in text for info in list_optimizers())


def test_nearest_keeps_silent_where_nothing_is_near() -> None:
    assert nearest("pretran", COMMANDS) == " (did you mean pretrain?)"
    assert nearest("qqq", COMMANDS) == ""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A little text, and where the tokenizer trained on it may lie."""
    root = tmp_path_factory.mktemp("text")
    for i in range(40):
        (root / f"{i}.md").write_text("\n".join(f"line {j} of text {i}: {i * j}" for j in range(60)))
    return ["--data.source", f"{root}/*.md", "--data.validation_percent", "20", "--data.cache_dir", str(root / "cache")]


@pytest.fixture(scope="module")
def run(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["pretrain", *TINY, *corpus, "--out", str(out)]) == 0
    return out


def test_a_run_from_words_to_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 3
    assert main(["report", str(run)]) == 0
    text = capsys.readouterr().out
    end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{end['perplexity']:.2f}" in text
    assert f"{run}/report/report.png" in text
    assert (run / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_sample_is_decided_by_its_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*words: str) -> str:
        assert main(["sample", str(run), "--prompt", "line 1", "--max-tokens", "8", *words]) == 0
        return capsys.readouterr().out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text("--temperature", "0") == text("--temperature", "0", "--seed", "5")
    assert text().startswith("line 1")


def test_sample_agrees_with_transformers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our own loop with its cache against `generate`, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    ids = tokenizer("line 1", return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=12, do_sample=False)
    assert main(["sample", str(run), "--prompt", "line 1", "--max-tokens", "12", "--temperature", "0"]) == 0
    ours = capsys.readouterr().out.removesuffix("\n")
    assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith(ours.rstrip("�"))


def test_sample_ends_with_the_context(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = sample.load(run / "model")
    model.config.max_position_embeddings = 12
    list(sample.generate(model, tokenizer, "line", max_tokens=100, temperature=0, seed=0))
    assert "context of 12 tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"the model's context only 12: shorten the prompt"):
        list(sample.generate(model, tokenizer, "line 1 " * 20, max_tokens=1, temperature=0, seed=0))


def test_export_and_a_run_without_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "model").rename(tmp_path / "model")
    try:
        assert main(["sample", str(run), "--max-tokens", "3"]) == 0
        assert not (run / "model").exists()  # sampling writes nothing into the run
        assert main(["export", str(run), "--step", "2"]) == 2
        assert "no checkpoint of step 2" in capsys.readouterr().err
        assert main(["export", str(run)]) == 0
        assert (run / "model" / "config.json").exists()
    finally:
        if not (run / "model").exists():
            (tmp_path / "model").rename(run / "model")


def test_resume_needs_no_run_file(run: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *TINY, *corpus, "--out", str(run)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["pretrain", "--out", str(run), "--resume"]) == 0
    assert main(["pretrain", "--out", str(run), "--resume", "--optim.lr", "0.5"]) == 2
    assert "optim.lr" in capsys.readouterr().err
