"""Datasets of any size: chunks, worker processes, the cache, and items read from a mapped file, against the
rows read and encoded at once.
"""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from runs import tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastrl.data import cache, chunks, dataset, store
from fastrl.data.comparisons import LineEncoder, Texts, encode_statements, read_statements
from fastrl.data.dataset import identity_of, read_items
from fastrl.data.encode import encode_all
from fastrl.data.encoders import Limits, PromptEncoder, SampleEncoder, UnitEncoder, changes, mask_of
from fastrl.data.known import DemonstrationEncoder, KnownPairEncoder
from fastrl.data.pairs import PAIRED, encode_units
from fastrl.data.progress import Progress
from fastrl.data.rows import check_rows, read_rows, read_table
from fastrl.data.words import SPLITS, Words, cuts_at_words
from fastrl.errors import UserError
from fastrl.methods.dpo.reference import _fingerprint
from fastrl.tasks.tokens import train_bpe

LIMITS = Limits(max_tokens=64, micro_tokens=64, vocab_size=31)
ROWS = [{"prompt": f"{i}+{i}=", "completion": "0" * (i % 7) + "1", "weight": i / 4} for i in range(300)]


@pytest.fixture(autouse=True)
def large(monkeypatch, tmp_path):
    """Every file is large, and is cut into many chunks; one process reads it."""
    monkeypatch.setenv("FASTRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset, "SMALL", 0)
    for name, value in (("BYTES", 1000), ("ROWS", 7), ("ITEMS", 7)):
        monkeypatch.setattr(chunks, name, value)


def written(tmp_path: Path, rows, name: str = "data.jsonl") -> str:
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text("\ufeff" + json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)))
    return str(path)


def never(*_):
    raise AssertionError("encoded again")


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet"])
def test_chunks_hold_the_rows_of_the_file(tmp_path, name):
    """Wrong implementations: a line or an item on a chunk's edge lost or read twice; numbers that begin anew
    in every chunk.
    """
    path = written(tmp_path, [{**row, "note": 'é]}",{[' * (i % 40)} for i, row in enumerate(ROWS)], name)
    cut = list(chunks.chunks(path))
    assert len(cut) > 20
    assert [row for chunk in cut for row in chunk.rows({})] == read_table(path)
    assert cut[-1].done == (chunks.extent(path) or len(ROWS))


@pytest.mark.parametrize("text", ["[{}, {]", '[{"a": 1} {"a": 2}]', '[{"a": 1},]', "[", '[{"a": 1}] 2'])
def test_a_broken_list_is_the_error_that_it_is_for_a_small_file(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError) as small:
        read_table(path)
    with pytest.raises(UserError) as large:
        list(chunks.chunks(str(path)))
    assert str(large.value) == str(small.value)


def test_items_are_those_of_one_call(tmp_path):
    path = written(tmp_path, ROWS)
    encoder = SampleEncoder(LIMITS, weighted=True)
    known = encoder.encode(read_rows(path), tokenizer())
    items = read_items(path, encoder, tokenizer())
    assert items.table is not None
    assert len(items) == len(known)
    assert items([299, 0, 7, 7]) == [known[299], known[0], known[7], known[7]]
    assert items(range(300)) == known
    assert items.size.tokens == sum(len(s.tokens) for s in known)
    with pytest.raises(IndexError):
        items[300]


def test_pairs_and_prompts_come_back_as_they_were(tmp_path):
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": str(i) * 3} for i in range(3, 9)]
    path = written(tmp_path, rows)
    units = encode_units(read_rows(path, kinds=PAIRED), tokenizer(), paired=True)
    assert read_items(path, UnitEncoder(LIMITS, True), tokenizer())(range(6)) == units

    rows = [{"question": "1+1=", "day": date(2026, 1, i), "tags": {"a": i, "b": [1.5]}} for i in range(1, 20)]
    columns = {"question": "prompt"}
    encoder = PromptEncoder(LIMITS, 64, 8, columns)
    for name in ("data.parquet", "data.jsonl"):
        given = [{**row, "day": str(row["day"])} if name == "data.jsonl" else row for row in rows]
        path = written(tmp_path, given, name)
        items = read_items(path, encoder, tokenizer(), columns=columns)
        assert [item.fields for item in items(range(19))] == [f for _, f in read_table(path, columns)]


def by_length(shares, name, key):
    assert name == "reward"
    return "held" if len(key) > shares["long"] else "train"


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (
            "compared",
            [
                {"prompt": "1+1=", "chosen": "2", "rejected": "3", "margin": 0.25},
                {"chosen": "1+2=3", "rejected": "1+2=4"},
                {"prompt": "1+1=11+", "completions": ["2", "33", "4"], "scores": [1, 0.5, 0.5]},
                {"prompt": "5+5=", "completions": ["10", "11"], "ranks": [1, 2]},
            ],
        ),
        ("verdict", [{"prompt": "1+1=" * (1 + i % 2), "completion": "2", "label": i / 5} for i in range(6)]),
        (
            "steps",
            [{"prompt": f"{i}+1=", "completions": ["1", "2"], "labels": [True, i / 9]} for i in range(9)],
        ),
    ],
)
def test_lines_of_reward_models_come_back_as_they_were(tmp_path, monkeypatch, data, rows):
    """Wrong implementations: a margin or a target lost; scores read at the wrong tokens; a line of the other
    split; the texts of another line.
    """
    path = written(tmp_path, rows * 3)
    statements = read_statements(path, data)
    groups = encode_statements(statements, tokenizer(), separator="+")
    encoder = LineEncoder(LIMITS, data, True, "+", {"long": 4}, by_length)
    large = read_items(path, encoder, tokenizer())
    monkeypatch.setattr(dataset, "SMALL", 1 << 20)
    small = read_items(path, encoder, tokenizer())
    assert large.table is not None and small.table is None
    assert large(range(len(groups))) == small(range(len(groups)))
    assert [line.group for line in large(range(len(large)))] == [replace(g, where="") for g in groups]

    held = [len(s.completions[0] if s.prompt is None else s.prompt) > 4 for s in statements]
    texts = [
        Texts(s.prompt, s.completions) if apart else None for s, apart in zip(statements, held, strict=True)
    ]
    assert [line.held for line in large(range(len(large)))] == texts
    assert (large.firsts() > 0).tolist() == (small.firsts() > 0).tolist() == held
    other = replace(encoder, shares={"long": 40})
    assert not read_items(path, other, tokenizer()).firsts().any()


def test_known_completions_come_back_as_they_were(tmp_path):
    """Wrong implementations: an empty completion as one of no tokens; one side in the place of the other."""
    rows = [{"prompt": f"{i}+1=", "completion": "1" * (i % 3)} for i in range(9)]
    encoder = DemonstrationEncoder(LIMITS)
    path = written(tmp_path, rows)
    known = encoder.encode(read_rows(path), tokenizer())
    assert known[0] is None and known[1] is not None
    assert read_items(path, encoder, tokenizer())(range(9)) == known

    sides = KnownPairEncoder(LIMITS)
    path = written(
        tmp_path, [{"prompt": "1+", "chosen": "2" * (i % 3), "rejected": "1" * (i % 2)} for i in range(9)]
    )
    pairs = sides.encode(read_rows(path), tokenizer())
    assert pairs[0] == (None, None) and pairs[1][1] is not None and pairs[2][1] is None
    assert read_items(path, sides, tokenizer())(range(9)) == pairs


@pytest.mark.parametrize("small", [0, 1 << 20])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet"])
def test_of_two_faults_the_earlier_line_is_told(tmp_path, monkeypatch, small, name):
    """Wrong implementation: what is found by reading before what is found by encoding."""
    monkeypatch.setattr(dataset, "SMALL", small)
    for name_of_chunk in ("BYTES", "ROWS", "ITEMS"):
        monkeypatch.setattr(chunks, name_of_chunk, 1 << 20)
    rows = [*ROWS[:3], {"prompt": "1", "completion": "1" * 80}, {"prompt": "1", "completion": None}, ROWS[3]]
    path = written(tmp_path, rows, name)
    where = {"data.jsonl": ":7", "data.json": ": item 4", "data.parquet": ": row 4"}[name]
    with pytest.raises(UserError, match=f"{name}{where}: 82 tokens"):
        read_items(path, SampleEncoder(LIMITS), tokenizer())
    if name == "data.jsonl":
        Path(path).write_text("\n".join([json.dumps(rows[0]), '{"prompt": 1, "completion": "1"}', "{"]))
        with pytest.raises(UserError, match=r"data.jsonl:2: prompt: expected"):
            read_items(path, SampleEncoder(LIMITS), tokenizer())


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_a_folder_that_looks_like_a_partition_adds_no_column(tmp_path, monkeypatch, small):
    monkeypatch.setattr(dataset, "SMALL", small)
    folder = tmp_path / "weight=7"
    folder.mkdir()
    path = written(folder, [{"prompt": f"{i}+1="} for i in range(9)], "data.parquet")
    items = read_items(path, PromptEncoder(LIMITS, 64, 8, {}), tokenizer())
    assert [item.fields for item in items(range(9))] == [{"prompt": f"{i}+1="} for i in range(9)]


def test_references_of_a_large_file_are_those_of_its_contents(tmp_path):
    """Wrong implementations: a digest of lengths; one without the draw, or without the model."""

    def prints(last: str, numbers=range(6), model: str = "m") -> str:
        rows = [{"prompt": "1+1=", "chosen": "2", "rejected": str(i) * 3} for i in range(3, 8)]
        path = written(tmp_path, [*rows, {"prompt": "1+1=", "chosen": "2", "rejected": last}])
        return _fingerprint(read_items(path, UnitEncoder(LIMITS, True), tokenizer()), numbers, model)

    found = [prints("77"), prints("78"), prints("77", range(5)), prints("77", model="n")]
    assert len(set(found)) == 4
    assert prints("77") == found[0]


def test_worker_processes_give_the_same_items_and_the_first_error(tmp_path, monkeypatch):
    """Wrong implementations: chunks in the order in which they are done; the error that came first in time; a
    tokenizer that does not arrive as it was sent.
    """
    monkeypatch.setattr(dataset, "PARALLEL", 2)
    monkeypatch.setattr(dataset, "cores", lambda: 2)
    bad = [*ROWS[:200], {"prompt": "1", "completion": "1" * 80}, *ROWS[:20], {"text": 3}]
    path = written(tmp_path, bad)
    encoder = SampleEncoder(LIMITS)
    job = dataset.Job(path, encoder, tokenizer(), {})
    found = []
    with Progress("") as progress, pytest.raises(UserError) as error:
        for batch, size, _ in job.encoded(progress):
            file = tmp_path / "batch"
            store.write(file, [batch])
            found += map(encoder.item, store.Table(file))
            assert size.rows == batch.num_rows
    assert str(error.value).startswith(f"{path}:401: 82 tokens (1 of the prompt, 81 of the completion)")
    assert found == encode_all(check_rows(read_table(path)[:200]), tokenizer())[: len(found)]
    assert len(found) > 150


def test_what_is_cached_is_not_encoded_again_unless_something_changed(tmp_path, monkeypatch):
    path = written(tmp_path, ROWS)
    encoder = SampleEncoder(LIMITS)
    first = read_items(path, encoder, tokenizer())(range(300))

    work = dataset.Work.batch
    monkeypatch.setattr(dataset.Work, "batch", never)
    assert read_items(path, encoder, tokenizer())(range(300)) == first
    assert len(read_items(path, SampleEncoder(Limits(63, 50, 31)), tokenizer())) == 300  # within these, too
    other = tokenizer()
    other.chat_template = "{{ messages }}"
    for changed, its in ((SampleEncoder(LIMITS, weighted=True), tokenizer()), (encoder, other)):
        with pytest.raises(AssertionError, match="encoded again"):
            read_items(path, changed, its)

    monkeypatch.setattr(dataset.Work, "batch", work)
    with pytest.raises(UserError, match=r"data.jsonl:\d+: .* tokens .*, but a sequence may have 5"):
        read_items(path, SampleEncoder(Limits(5, 64, 31)), tokenizer())
    with pytest.raises(UserError, match=r"data.jsonl:1: the tokenizer gives token"):
        read_items(path, SampleEncoder(Limits(64, 64, 3)), tokenizer())


@pytest.mark.parametrize("damage", ["flip", "cut", "entry", "gone"])
def test_a_damaged_entry_is_made_again(tmp_path, damage, capsys):
    path = written(tmp_path, ROWS)
    first = read_items(path, SampleEncoder(LIMITS), tokenizer())(range(300))
    (data,) = cache.cache_folder().glob("*/data.arrow")
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 4
    if damage == "gone":
        data.unlink()
    elif damage == "entry":
        (data.parent / "entry.json").write_text("[]")
    else:
        data.write_bytes(raw if damage == "flip" else raw[:-100])
    assert read_items(path, SampleEncoder(LIMITS), tokenizer())(range(300)) == first
    assert "not what was written there" in capsys.readouterr().out


def test_two_runs_at_once_encode_once(tmp_path, monkeypatch):
    made = []

    def make(path: Path) -> dict:
        made.append(path)
        path.write_text("x")
        return {"rows": 1}

    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(cache.find_or_make("k", make, lambda _: None, lambda _: True))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(found) == 4 and len(set(map(str, found))) == 1


def test_a_folder_that_cannot_be_written_is_told_and_an_empty_file_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTRL_CACHE", str(tmp_path / "file"))
    assert len(read_items(written(tmp_path, ROWS), SampleEncoder(LIMITS), tokenizer())) == 300
    assert "kept for this run alone; set FASTRL_CACHE" in " ".join(capsys.readouterr().out.split())

    monkeypatch.setenv("FASTRL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match=r"blank.jsonl: expected at least one row"):
        read_items(str(tmp_path / "blank.jsonl"), SampleEncoder(LIMITS), tokenizer())


def test_masks_are_kept_by_where_they_change():
    for mask in ([], [False], [False, True], [True, True, False, True], [False, False, True, False]):
        assert mask_of(changes(mask), len(mask)) == mask


def test_a_template_that_writes_the_date_is_of_today(monkeypatch):
    plain, dated = tokenizer(), tokenizer()
    dated.chat_template = "{{ strftime_now('%d') }}"
    before = identity_of(plain), identity_of(dated)

    class Tomorrow(date):
        @classmethod
        def today(cls):
            return cls(2100, 1, 1)

    monkeypatch.setattr(dataset, "date", Tomorrow)
    assert identity_of(plain) == before[0]
    assert identity_of(dated) != before[1]


WORDS = [
    f"it's a{c}b {c} c{c}{c} d  e\n f 12 x3 {c}g h we'LL 12345 {c} x"
    for c in ("", " ", "'s", "é", "\u0301", "中", "\n", ".", "'S ", " 1", "$", "\u00a0", "\r\n ")
]


@pytest.mark.parametrize("pattern", SPLITS)
def test_words_of_a_tokenizer_that_cuts_by_an_expression(pattern):
    """Wrong: another cut than Llama's or Qwen's; special tokens that the tokenizer itself splits."""
    core = Tokenizer(models.BPE(unk_token=None))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), whole]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(WORDS, trainer)
    bpe = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    texts = [*WORDS, "a <eos> b<eos>c"]
    assert cuts_at_words(bpe)
    assert Words(bpe).ids(texts) == bpe(texts, add_special_tokens=False)["input_ids"]

    cuts_at_words.cache_clear()
    bpe.split_special_tokens = True
    assert not cuts_at_words(bpe)


def test_words_give_the_tokens_of_their_texts():
    """Wrong implementations: cutting where the tokenizer does not, as before a digit or two spaces."""
    texts = WORDS
    bpe = train_bpe(texts, 300)
    assert cuts_at_words(bpe)
    assert Words(bpe).ids(texts) == bpe(texts, add_special_tokens=False)["input_ids"]

    assert not cuts_at_words(tokenizer()), "characters, without a cut into words"
    bpe.add_tokens(["two words"])
    cuts_at_words.cache_clear()
    assert not cuts_at_words(bpe), "an added token that has a boundary in it"
