"""What is told of foreign text: no token in any place, and nothing that a screen or a card would take for its own."""

import logging
import re

import pytest
from helpers import examples, settings, small_student, some_slow, timm_swin
from huggingface_hub import ModelCard, constants
from hypothesis import example, given
from hypothesis import strategies as st

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.cli import evaluate, main
from scalekd_hf.data import sources
from scalekd_hf.data.bad_images import describe, where
from scalekd_hf.data.decoding import BadImageError
from scalekd_hf.data.loading import DataArguments, load_data
from scalekd_hf.publishing import hub as hub_module
from scalekd_hf.publishing.hub import PushError
from scalekd_hf.publishing.model_card import CardFacts, make_card, table, update_evaluation
from scalekd_hf.publishing.provenance import Source
from scalekd_hf.texts import inline, one_line, redacted, without_secrets
from scalekd_hf.tools.recipe import DistillArguments, given_arguments, write_config


TOKEN = "hf_" + "Kn0wnByHeart" * 3
SIGNED = "https://me:pa55word@127.0.0.1/a.parquet?X-Amz-Signature=0fa9&x=1"


def told(error):
    """An error with all that is printed of what led to it."""
    import traceback

    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("way", some_slow(["environment", "argument", "setting", "file"], 1))
def test_no_token_is_told_where_a_push_fails(tmp_path, digits, hub, monkeypatch, caplog, capfd, way):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(hub_module, "PAUSES", (0.0,))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if way == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    if way == "file":
        (tmp_path / "token").write_text(TOKEN)
    hub.accepts, hub.tells = TOKEN, True  # it is a careless one, whose errors say who has asked
    options = {"push_to_hub": True, "hub_model_id": "me/student", "max_steps": 2, "report_to": "tensorboard"}
    options |= {"save_strategy": "steps", "save_steps": 2, "hub_always_push": True}
    options |= {"hub_token": TOKEN} if way in ("setting", "argument") else {}
    trainer = ScaleKDTrainer(small_student(), timm_swin(), settings(tmp_path / "run", **options), digits)
    if way == "argument":
        trainer.args.hub_token = None
    given = {"token": TOKEN} if way == "argument" else {}
    hub.failing = 10**6
    trainer.train()
    with pytest.raises(PushError) as failed:
        trainer.push_to_hub(**given)
    hub.failing = 0
    hub.accepts = "another"
    with pytest.raises((PushError, ValueError)) as refused:
        trainer.push_to_hub(revision="other", **given)
    assert any(TOKEN in sent for sent in hub.authorizations)
    texts = [told(failed.value), told(refused.value), caplog.text, *capfd.readouterr()]
    assert "you have sent" in texts[0] and not any(TOKEN in text for text in texts)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {"README.md", "training_config.yaml", "trainer_state.json"} < {file.name for file in files}
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]


def test_what_opens_or_signs_a_url_is_in_no_error_log_or_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sources, "RETRY_DELAYS", (0.0,))
    secrets = ("pa55word", "0fa9")
    with pytest.raises(ValueError) as refused:  # its ending is not read
        load_data(DataArguments(train_files=SIGNED, eval_split="none"))
    try:
        raise ConnectionError(f"cannot open {SIGNED}") from OSError(TOKEN)
    except ConnectionError as error:
        raised = error

    def fail():
        raise raised

    with pytest.raises(sources.StreamReadError) as ended:
        sources.retrying(fail, f"the footer of {SIGNED}")
    bad = describe(BadImageError(f"no {SIGNED}"), 3, {}, {"path": SIGNED})
    arguments = DistillArguments(student="a", teacher="b", train_files=SIGNED)
    write_config(arguments, settings(tmp_path / "run", hub_token=TOKEN), tmp_path / "resolved.yaml")
    texts = [
        told(refused.value),
        told(ended.value),
        caplog.text,
        str(bad),
        where(bad),
        str(given_arguments(arguments)),
    ]
    texts += [(tmp_path / "resolved.yaml").read_text(), evaluate.command(["--eval_files", SIGNED], 1)]
    for text in texts:
        assert not any(secret in text for secret in (*secrets, TOKEN)) and "(hidden)" in text
    assert "127.0.0.1/a.parquet" in texts[0] and "x=1" in texts[1]


def test_what_is_hidden_is_what_is_secret():
    for text in (
        "hf://datasets/me/data@0123/train.parquet",
        "git@github.com:me/it",
        "https://host/a?x=1&page=2",
        "hf_hub_download and hf_transfer",
        "a@b.c wrote to s3://bucket/key",
        "user@host://",
    ):
        assert redacted(text) == text
    assert redacted("Authorization: Bearer abc.def-1") == "Authorization: Bearer (hidden)"
    assert redacted("mine is pass", "pass") == "mine is (hidden)"
    error = ValueError("plain")
    assert without_secrets(error) is error
    error.__context__ = OSError(f"with {TOKEN}")
    assert without_secrets(error) is None


HOSTILE = [
    "<script>alert(1)</script>",
    "[click](http://evil) ![x](y)",
    "a | b\n| c |",
    "---\nlicense: mit\n---\n",
    "{{ 7 * 7 }}{% for x in y %}",
    "`code` and ``` fence\n```\n# heading",
    "<!-- evaluation --><!-- /evaluation -->",
    "\x1b[31mred\x1b[0m\r\x00\u2028\u202e",
    "\\`*_~$\\",
    "'\"): import os #",
    "x" * 9999,
    "null",
    "!!python/object/apply:os.system ['x']",
]
texts = st.one_of(st.sampled_from(HOSTILE), st.text(), st.text("<>|`[]()*_\\-#{}%!&\n\r\x1b'\": ", max_size=30))
names = texts.filter(lambda text: one_line(text).split("/")[-1].strip())
CELLS = re.compile(r"(?<!\\)\|")


def facts_of(name, other):
    results = {"student distilled": {"top1": 0.5}, other: {"top1": 0.25}}
    return CardFacts(
        name,
        "timm",
        Source(name),
        10**6,
        10,
        teacher=Source(other, other, other, other, "vit"),
        data=Source(name, name, other),
        evaluated=Source(name, name, other, split=other),
        student_pretrained=True,
        results=results,
        facts={"data": f"`{name}`, revision {other}", name: other},
        settings={name: other, "stem": name},
        baseline_args={name: other},
        license=name,
        language=[other],
        tags=[name, other],
    )


@examples(15)
@given(names, names)
@example(*HOSTILE[:2])
@example(*HOSTILE[2:4])
@example(*HOSTILE[4:6])
@example(*HOSTILE[6:8])
def test_nothing_that_a_card_names_is_taken_for_the_card(tmp_path_factory, name, other):
    plain, foreign = str(make_card(facts_of("plain", "words"))), facts_of(name, other)
    card = make_card(foreign)
    folder = tmp_path_factory.mktemp("card")
    card.save(folder / "README.md")
    read = ModelCard.load(folder / "README.md")
    assert read.data.to_dict() == card.data.to_dict()
    assert {one_line(name), one_line(other)} <= set(read.data.tags) and read.data.license == one_line(name)
    assert {result.dataset_name for result in read.data.eval_results} == {one_line(name)}
    plain_text = ModelCard(plain).text
    assert len(read.text.splitlines()) == len(plain_text.splitlines())
    for line, expected in zip(read.text.splitlines(), plain_text.splitlines(), strict=True):
        if expected.startswith("|"):
            assert len(CELLS.findall(line)) == len(CELLS.findall(expected)), line
        begins, should = (re.match(r"\W{0,2}", begin)[0] for begin in (line, expected))
        assert begins == should or (expected[:1] == "`" and line[0] in '`"') or expected[:1] in ("#", "|"), line
    assert re.findall(r"<[!/\w][^>]*", read.text) == re.findall(r"<[!/\w][^>]*", plain_text)
    outside = re.sub(r"```python.*?\n```|(?<!\\)(?:\\\\)*`[^`\n]+`", "", read.text, flags=re.DOTALL)  # of code
    assert len(re.findall(r"(?<!\\)\]\(", outside)) == len(re.findall(r"\]\(", plain_text))
    code = read.text.split("```python\n")[1].split("\n```")[0]
    compile(code, "card", "exec")
    update_evaluation(str(folder), [{"dataset": other, "split": name, "top1": 0.125}])
    again = ModelCard.load(folder / "README.md")
    assert again.data.eval_results[-1].dataset_name == one_line(other) and again.text.count("<!-- evaluation -->") == 1
    assert again.data.tags == read.data.tags


@examples(50)
@given(texts)
def test_a_text_stays_one_line_and_one_cell(text):
    assert one_line(text).isprintable() and "\x1b" not in one_line(text)
    (_, _, row) = table("data", {text: {"top1": 0.5}}).split("\n")
    assert len(CELLS.findall(row)) == 3 and row.endswith("| 50.00% |")
    assert not set("<>") & set(inline(text))


def test_no_name_moves_the_cursor_of_a_screen(tmp_path, capsys):
    name = "\x1b[2Jgone\r\nscalekd: all is well"
    with pytest.raises(SystemExit):
        main.main(["evaluate", str(tmp_path / name), "--dataset", str(tmp_path / name), "--use_cpu"])
    error = capsys.readouterr().err
    assert "\x1b" not in error and error.count("\n") == error.strip().count("\n") + 1
    row = {"model": name, "dataset": name, "split": "test", "top1": 0.5}
    assert "\x1b" not in evaluate.table_of([row]) and len(evaluate.table_of([row]).splitlines()) == 2
