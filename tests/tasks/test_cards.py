"""The card game: the solver's published counts, the verifier against brute force, splits that do not leak."""

from __future__ import annotations

import random
import re
import time
from fractions import Fraction
from itertools import combinations_with_replacement

import pytest

from fastrl.errors import UserError
from fastrl.tasks.cards.rules import RANKS, hands, number_sets, reachable, solutions, translate, write_answer
from fastrl.tasks.cards.task import ALPHABET, REWARDS, SPLITS, Cards
from fastrl.tasks.task import Example, assign_split

RULE_VALUES = {"b": list(range(1, 14)), "a": [min(n, 10) for n in range(1, 14)]}


def solvable(values, k, target, *, fractions=True, limit=None):
    pools = combinations_with_replacement(sorted(values), k)
    return sum(target in reachable(pool, fractions=fractions, limit=limit) for pool in pools)


# --- the solver: counts of reference/algorithms.md 12.1 ----------------------------------------------
@pytest.mark.parametrize(("rule", "count"), [("b", 1362), ("a", 1236)])
def test_hands_of_four_that_make_24(rule, count):
    """A float solver (8/(3-8/3) = 23.99999999999999) and one without fractions (1334 and 1201) give other
    counts.
    """
    assert solvable(RULE_VALUES[rule], 4, 24) == count


@pytest.mark.parametrize(("rule", "count", "mean"), [("b", 1334, 9.1), ("a", 1201, 7.8)])
def test_integer_solutions_of_four_cards(rule, count, mean):
    """Counting both orders of a sum or a product, or the same pair of cards twice, gives a larger mean."""
    ways = [
        len(solutions(tuple(sorted(pool)), 24))
        for pool in combinations_with_replacement(RULE_VALUES[rule], 4)
    ]
    assert sum(w > 0 for w in ways) == count
    assert round(sum(ways) / count, 1) == mean


@pytest.mark.parametrize(("largest", "count"), [(10, 566), (9, 404), (6, 105)])
def test_small_numbers_that_make_24(largest, count):
    assert solvable(range(1, largest + 1), 4, 24) == count


@pytest.mark.parametrize(("rule", "k", "count"), [("b", 3, 111), ("a", 3, 101), ("b", 2, 5)])
def test_fewer_cards_that_make_24(rule, k, count):
    assert solvable(RULE_VALUES[rule], k, 24) == count


@pytest.mark.parametrize(
    ("target", "count"),
    [
        (10, 1540),
        (12, 1535),
        (20, 1372),
        (21, 1254),
        (23, 1108),
        (25, 1074),
        (30, 1193),
        (36, 1270),
        (48, 1139),
    ],
)
def test_other_targets(target, count):
    assert solvable(RULE_VALUES["b"], 4, target) == count


@pytest.mark.parametrize(("k", "count"), [(2, 239), (3, 4205), (4, 49947)])
def test_pairs_of_numbers_and_target(k, count):
    """Numbers 1 to 13, targets 1 to 40, integers of at least 0 and at most 99; without the bound of 99 there
    are 4209 for k=3.
    """
    assert sum(1 <= end <= 40 for pool in number_sets(k, "b") for end in reachable(pool)) == count


def test_every_hand_is_translated_back():
    for rule in "ab":
        for numbers in number_sets(2, rule):
            assert all(tuple(sorted(translate(hand, rule))) == numbers for hand in hands(numbers, rule))
    assert sum(len(hands(n, "a")) for n in number_sets(3, "a")) == 13**3, (
        "each ordered hand belongs to one set of numbers"
    )
    assert set(hands((10, 10), "a", True)) == {a + b for a in "TJQK" for b in "TJQK"} - {"TT"}


# --- the verifier ------------------------------------------------------------------------------------
CARDS = Cards()


def problem(cards: str, rule: str, target: int) -> Example:
    fields = {"rule": rule, "cards": cards, "numbers": list(translate(cards, rule)), "target": target}
    return Example(prompt=f"{rule}:{cards}>{target}|", fields=fields)


def test_the_format_of_the_specification():
    """`b:7K3>18|` is answered by `7,13,3;13-7=6;6*3=18`; under rule a the king counts 10, so this is no
    answer there.
    """
    answer = "7,13,3;13-7=6;6*3=18"
    assert CARDS.verify(problem("7K3", "b", 18), answer).correct
    score = CARDS.verify(problem("7K3", "a", 18), answer)
    assert score.well_formed
    assert not score.correct
    assert score.message == "the cards are worth [7, 10, 3], not [7, 13, 3]"


@pytest.mark.parametrize(
    ("answer", "wrong_verifier"),
    [
        ("", "one that splits without counting"),
        ("7,10,3;10-7=3", "one that does not count the steps"),
        ("7,10,3;10-7=3;3*3=9;9+0=9", "one that takes extra steps"),
        ("7,10,3", "one that only reads the numbers"),
        ("7,10;10+7=17;17+3=20", "one that zips numbers and cards"),
        ("7,10,3;7*3=21;21+10=31 ", "one that strips spaces"),
        ("7,10,3;7*3=21;21-10=11\n", "a regex with $ instead of fullmatch"),
        ("07,10,3;7*3=21;21-10=11", "int() on leading zeros"),
        ("7,10,3;7*3=+21;21-10=11", "int() on signs"),
        ("7,10,3;10-7=3;3-3=00", "int() on leading zeros of results"),
        ("7,1_0,3;7*3=21;21-10=11", "int() on underscores"),
        ("٧,10,3;7*3=21;21-10=11", "str.isdigit() on digits of other scripts"),
        ("7,10,3;7**3=343;343+10=353", "eval()"),
        ("7,10,3;7//3=2;10*2=20", "eval()"),
        ("7,10,3;10/7=10/7;3*10/7=30/7", "one that reads fractions where they are off"),
        ("7,10,3;7*3=21=21;21-10=11", "split('=')[0] and [-1]"),
        ("7,10,3;;7*3=21;21-10=11", "one that skips empty steps"),
        ("9" * 100_000, "one without a bound on length"),
        ("7,10,3;" + "9" * 5000 + "+7=8;1+1=2", "int() of more digits than Python converts"),
    ],
)
def test_ill_formed_answers(answer, wrong_verifier):
    score = CARDS.verify(problem("7K3", "a", 20), answer)
    assert not score.well_formed and not score.correct and score.reward == 0 and score.message, wrong_verifier


@pytest.mark.parametrize(
    ("answer", "target", "level", "wrong_verifier"),
    [
        ("10,7,3;7*3=21;21-10=11", 11, 1, "one that sorts the numbers before it compares them"),
        ("7,11,3;7*3=21;21-11=10", 10, 1, "one that never looks at the cards"),
        ("7,13,3;13-7=6;6*3=18", 18, 1, "one that applies the other rule"),
        ("7,10,3;7*3=21;21-11=10", 10, 2, "one that does not look operands up in the pool"),
        ("7,10,3;7+7=14;14+10=24", 24, 2, "one whose pool is a set"),
        ("7,10,3;7*3=21;7+10=17", 17, 2, "one that does not remove used numbers"),
        ("7,10,3;7*3=22;22-10=12", 12, 2, "one that does not compute the result"),
        ("7,10,3;7-10=3;3*3=9", 9, 2, "one that takes absolute values"),
        ("7,10,3;10/3=3;7*3=21", 21, 2, "one that divides integers with //"),
        ("7,10,3;10-7=3;3/0=3", 3, 2, "one that divides by zero"),
        ("7,10,3;7*3=21;21-10=11", 12, 2, "one that never looks at the target"),
        ("7,10,3;7*3=21;21-10=11", 11, 3, ""),
        ("7,10,3;10-7=3;3-3=0", 0, 3, ""),
    ],
)
def test_well_formed_answers(answer, target, level, wrong_verifier):
    for name, rewards in REWARDS.items():
        score = Cards(reward=name).verify(problem("7K3", "a", target), answer)
        assert score.well_formed and score.correct == (level == 3) and score.reward == rewards[level], (
            wrong_verifier
        )


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("7,13,3;13-7=6;6*3=18", [True, True, True]),
        ("7,13,3;13-7=6;6*3=19", [True, True, False]),
        ("7,13,3;13-7=6;6+3=9", [True, True, False]),  # exact, and not the target
        ("7,13,3;13-7=5;6*3=18", [True, False, False]),  # what follows a wrong step is wrong
        ("7,13,2;13-7=6;6*3=18", [False, False, False]),
        ("7,13,3;13-7=6", [True, False]),  # right so far, and no more follows
        ("7,13,3;13-7=6;6*", [True, True, False]),
        ("7,13,3;13-7=6;13*3=39", [True, True, False]),  # 13 is spent
        ("7,13,3;13-7=6;6*3=18;", [True, True, True, False]),
        ("", [False]),
        ("7,13,3;" + "9" * 10**6, [False, False]),
    ],
)
def test_steps_are_right_as_far_as_all_before_them(answer, right):
    """Wrong implementations: the last step judged as the others, by which an answer that stops short or
    misses the target is right; steps judged each for itself.
    """
    task = Cards(k=3, rules="b")
    example = Example(prompt="b:7K3>18|", fields={"numbers": [7, 13, 3], "target": 18})
    assert task.steps(example, answer) == (answer.split(";"), right)
    assert right[-1] == task.verify(example, answer).correct


def test_division_by_zero_and_bounded_time():
    example = problem("7335", "a", 18)
    assert not Cards(k=4).verify(example, "7,3,3,5;3-3=0;7/0=7;7+5=12").correct
    start = time.perf_counter()
    for text in ("1" * 10**7, ";" * 10**7, "7,3,3,5" + ";1+1=2" * 10**6, "1/" * 120, "+" * 250):
        assert not Cards(k=4, fractions=True).verify(example, text).well_formed
    assert time.perf_counter() - start < 1


def test_fractions_are_exact():
    """A float verifier rejects 8/(3-8/3) = 24; so does one that reads `8/1/3` only from the left."""
    task = Cards(k=4, fractions=True, limit=None)
    example, answer = problem("3838", "a", 24), "3,8,3,8;8/3=8/3;3-8/3=1/3;8/1/3=24"
    ways = solutions((3, 3, 8, 8), 24, fractions=True, limit=None)
    assert [write_answer((3, 8, 3, 8), way) for way in ways] == [answer]
    assert not solutions((3, 3, 8, 8), 24, limit=None)
    assert task.verify(example, answer).correct
    assert not task.verify(example, "3,8,3,8;8/3=8/3;3-8/3=1/3;8/1/3=8/3").correct, (
        "the other reading of 8/1/3, not from this pool"
    )
    assert not task.verify(example, "3,8,3,8;8/3=16/6;3-8/3=1/3;8/1/3=24").well_formed, "lowest terms only"
    assert not Cards(k=4).verify(example, answer).well_formed, "fractions are off by default"


def truly_correct(answer: str, numbers: list[int], target: int) -> bool:
    """An independent reading: every step a regex match, values as Fractions, the pool a list of strings."""
    head, *steps = answer.split(";")
    if head != ",".join(map(str, numbers)) or len(steps) != len(numbers) - 1:
        return False
    pool = [str(n) for n in numbers]
    for step in steps:
        match = re.fullmatch(r"([0-9]+)([-+*/])([0-9]+)=([0-9]+)", step)
        if match is None or str(int(match[4])) != match[4]:
            return False
        left, right = Fraction(int(match[1])), Fraction(int(match[3]))
        if match[2] == "/" and right == 0:
            return False
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left / (right or 1)}[match[2]]
        for used in (match[1], match[3]):
            if used not in pool:
                return False
            pool.remove(used)
        if value != int(match[4]):
            return False
        pool.append(match[4])
    return pool == [str(target)]


def mutate(answer: str, rng: random.Random) -> str:
    kind = rng.randrange(4)
    i = rng.randrange(len(answer))
    if kind == 0:  # another character
        return answer[:i] + rng.choice("0123456789+-*/=,;") + answer[i + 1 :]
    if kind == 1:  # a missing character
        return answer[:i] + answer[i + 1 :]
    if kind == 2:  # the operands of one step the other way round
        return re.sub(r"(\d+)([-+*/])(\d+)=", r"\3\2\1=", answer, count=rng.randrange(1, 3))
    a, b = sorted(rng.sample(range(len(answer)), 2))
    return answer[:a] + answer[b] + answer[a + 1 : b] + answer[a] + answer[b + 1 :]


def test_mutated_demonstrations_against_brute_force():
    rng = random.Random(0)
    seen = [0, 0]
    for index in range(600):
        example = CARDS.example("train", index)
        answer = mutate(example.demo, rng)
        right = truly_correct(answer, example.fields["numbers"], example.fields["target"])
        assert CARDS.verify(example, answer).correct == right, (example, answer)
        seen[right] += 1
    assert min(seen) > 50, "both verdicts must occur"


@pytest.mark.parametrize(
    "options",
    [{}, {"k": 2}, {"k": 4, "targets": (24, 24)}, {"fractions": True}, {"rules": "ab", "filler": 4}],
)
def test_every_demonstration_verifies(options):
    task = Cards(**options)
    tokenizer = task.tokenizer()
    for split in SPLITS if task.rules != "ab" else SPLITS[:3]:
        for index in range(0, task.size(split), max(1, task.size(split) // 100)):
            example = task.example(split, index)
            score = task.verify(example, example.demo)
            assert score.correct and score.well_formed and score.reward == 1 and score.message == "correct"
            assert tokenizer.unk_token_id not in tokenizer(example.prompt + example.demo).input_ids


# --- splits ------------------------------------------------------------------------------------------
def keys(task, split):
    found = (task.example(split, i).fields for i in range(min(task.size(split), 12_000)))
    return {(tuple(sorted(f["numbers"])), f["target"]) for f in found}


def leaks(train, other):
    return len(train & other) / len(other)


@pytest.mark.parametrize("options", [{}, {"rules": "ab"}, {"k": 2}])
def test_splits_share_no_problem(options):
    task = Cards(**options)
    train = keys(task, "train")
    others = {split: keys(task, split) for split in SPLITS[1:] if split != "ood_rule" or task.rules != "ab"}
    assert {split: leaks(train, found) for split, found in others.items()} == dict.fromkeys(others, 0.0)
    assert others["perturbed"] == others["test"] and not others["val"] & others["test"]
    both = Cards(**{**options, "rules": "ab"})
    for split in ("test", "ood_rule"):  # a base model trained on both rules has seen neither
        assert not keys(both, "train") & keys(Cards(**{**options, "rules": "a"}), split)


def test_a_split_by_cards_leaks():
    """The named wrong implementation: hashing (sorted cards, target). Under rule a it puts half the test
    problems into train.
    """
    shares = {"test": 0.15, "train": 0.85}
    found = {"train": set(), "test": set()}
    for cards in combinations_with_replacement(RANKS, 3):
        numbers = tuple(sorted(translate("".join(cards), "a")))
        for target in (t for t in reachable(numbers) if 1 <= t <= 40):
            found[assign_split(shares, sorted(cards), target)].add((numbers, target))
    assert leaks(found["train"], found["test"]) > 0.3


def test_prompts_of_a_split_are_distinct():
    for split in ("val", "test", "ood_rule"):
        prompts = [CARDS.example(split, i).prompt for i in range(CARDS.size(split))]
        assert len(set(prompts)) == len(prompts) >= 500
    problems = len(keys(CARDS, "test"))
    first = {
        (tuple(sorted(f["numbers"])), f["target"])
        for f in (CARDS.example("test", i).fields for i in range(problems))
    }
    assert len(first) == problems, "every problem once before any comes again"


def test_training_deals_new_hands_and_demonstrations():
    problems = CARDS.size("train") // CARDS.repeats
    assert problems == len(keys(CARDS, "train")) and CARDS.size("train") > 100_000
    ways: dict[tuple, set] = {}
    for i in range(20 * problems):
        e = CARDS.example("train", i)
        ways.setdefault((tuple(sorted(e.fields["numbers"])), e.fields["target"]), set()).add(
            (e.prompt, e.demo)
        )
    assert sum(map(len, ways.values())) > 8 * problems


def test_the_other_rule_needs_a_face_card():
    for trained, other in (("a", "b"), ("b", "a")):
        task = Cards(rules=trained)
        for i in range(200):
            fields = task.example("ood_rule", i).fields
            assert fields["rule"] == other and set(fields["cards"]) & set("JQK")
            assert (
                fields["numbers"]
                == list(translate(fields["cards"], other))
                != list(translate(fields["cards"], trained))
            )


def test_perturbed_prompts_keep_the_answer():
    task = Cards(filler=4)
    moved = 0
    for i in range(300):
        plain, other = task.example("test", i), task.example("perturbed", i)
        assert re.fullmatch(r"#[0-9AJQKT]{4}a:[A2-9TJQK]{3}>\d+\|", other.prompt)
        assert sorted(plain.fields["numbers"]) == sorted(other.fields["numbers"])
        assert plain.fields["target"] == other.fields["target"]
        assert plain.prompt[:5] != other.prompt[:5]
        moved += plain.fields["numbers"] != other.fields["numbers"]
    assert moved > 250


def test_examples_are_a_pure_function_of_options_split_and_index():
    """hash() (which differs per process) and random.Random (whose algorithms may change) would move these
    golden prompts.
    """
    assert [CARDS.example(s, 0).prompt for s in SPLITS] == [
        "a:636>15|",
        "a:6J3>36|",
        "a:AQ7>2|",
        "b:K2A>10|",
        "a:TA7>2|",
    ]
    again = [Cards().example("train", i) for i in (9, 5, 9)]
    assert again[0] == again[2] == CARDS.example("train", 9)
    assert Cards(seed=1).example("train", 9) != again[0]
    assert keys(Cards(seed=1), "test") == keys(CARDS, "test"), (
        "the seed does not move problems between splits"
    )


def test_loads_fast():
    start = time.perf_counter()
    assert Cards(k=3, test=0.151).size("train") > 0  # options no other test has cached
    assert time.perf_counter() - start < 2


def test_the_alphabet_is_small():
    assert len(ALPHABET) + 3 == len(CARDS.tokenizer()) == 31


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, "k: expected 2, 3 or 4"),
        ({"targets": (9, 3)}, "targets: expected two numbers"),
        ({"rules": "c"}, "rules: expected a, b or ab"),
        ({"limit": 30}, "limit: expected at least the highest target 40"),
        ({"reward": "best"}, "reward: expected one of binary, ladder"),
        ({"val": 0.5, "test": 0.5}, "shares that leave something"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Cards(**options)


def test_bad_splits_and_indices():
    with pytest.raises(
        UserError, match="expected a split of train, val, test, ood_rule, perturbed; got 'tset'"
    ):
        CARDS.size("tset")
    with pytest.raises(UserError, match="no problem falls into split 'ood_rule'"):
        Cards(rules="ab").size("ood_rule")
    for index in (-1, CARDS.size("val")):
        with pytest.raises(IndexError, match="expected 0 <= index"):
            CARDS.example("val", index)
