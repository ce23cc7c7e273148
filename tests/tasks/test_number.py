"""Numbers as models write them: each form has one value, and what is not one number has none."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from fastrl.tasks.gsm8k import Gsm8k, extract, last_number
from fastrl.tasks.number import read_number
from fastrl.tasks.task import Example

READ = {
    18: (
        "18",
        "+18",
        "18.",
        "18.00",
        "$18.00",
        r"\$18",
        r"\$ 18",
        "$18$",
        "$$18$$",
        r"\(18\)",
        r"\[ 18 \]",
        "**18**",
        "**$18**",
        "__18__",
        "`18`",
        "18 eggs",
        "18-pack",
        "18 m^2",
        "18 (2 dozen)",
        "18, which is",
        "x = 18",
        "18 dollars = 1800 cents",
        r"\text{18}",
        r"\text{18 eggs}",
        r"\textbf{18}",
        r"\mathbf{18}",
        r"18\text{ dollars}",
        r"18\,\text{cm}",
        r"18\%",
        "18%",
        "\u20ac18",
        "18\u20ac",
        "USD 18",
        "\n\n18",
        "18\nand 5",
        r"\boxed{18}",
        r"\approx 18",
        r"18^\circ",
        r"18^{\circ}",
        "18\u00b0",
        "9 * 2 = 18",
        "36/2 = 18",
        "{18}",
    ),
    -5: ("-5", "\u22125", "\u20135", "-$5", "$-5", r"-\$5", "-5.0"),
    1234: (
        "1,234",
        "1{,}234",
        r"1\,234",
        r"1,\!234",
        "1 234",
        "1\u202f234",
        "1\u00a0234",
        "1'234",
        "1_234",
        "$1,234.00",
    ),
    1234567: ("1,234,567", "1{,}234{,}567", "1.234.567", "1 234 567", "12,34,567"),
    Fraction(123456, 100): ("1.234,56", "1,234.56"),
    Fraction(3, 4): (
        "3/4",
        "3/4 of a cake",
        r"\frac{3}{4}",
        r"\frac34",
        r"\dfrac{3}{4}",
        "\u00be",
        ".75",
        "0.75",
    ),
    Fraction(-3, 4): (r"-\frac{3}{4}", "-\u00be", "-3/4"),
    Fraction(3, 2): ("1 1/2", "1\u00bd", r"1\frac{1}{2}", "1.5"),
    1500: ("1.5e3", "1.5E+3", r"1.5 \times 10^{3}", "1.5\u00d710^3", "1.5*10^3", r"1.5 \cdot 10^3"),
    1000: ("10^3", "10^{3}", "1e3"),
    Fraction(1, 40): ("2.5e-2", r"2.5 \times 10^{-2}"),
}
NONE = (
    "",
    "seven",
    "x",
    "1,23",
    "12,34",
    "1,2345",
    "1.2.3",
    "1.234,5.6",
    "5/0",
    "1/2/3",
    "9" * 31,
    "1e99",
    "1 23",
    "5 6",
    "10-3",
    "5-6",
    "2*3",
    "2**3",
    "2^5",
    "18/x",
    "3:4",
    "1:30",
    "(3,4)",
    r"18\sqrt{2}",
    r"18\pi",
    "18\u03c0",
)


@pytest.mark.parametrize(
    ("text", "value"), [(text, value) for value, texts in READ.items() for text in texts]
)
def test_every_form_of_a_number_has_its_value(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize("text", NONE)
def test_what_is_not_one_number_is_none(text):
    """Wrong implementation: the first digits that there are, a number that was not meant."""
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{1{,}234}", 1234),
        (r"\boxed{\$18}", 18),
        (r"\boxed{\boxed{18}}", 18),
        (r"first \boxed{5}, then \boxed{ 18 }.", 18),
        (r"\boxed{\text{18 eggs}}", 18),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{18} eggs, 5 of them", 18),
        (r"\boxed{18}5", 18),
        (r"\fbox{18}", 18),
        (r"\boxed{(3, 4)}", None),
        (r"\boxed{18", 18),
        (r"#### \$18", 18),
        ("#### +18", 18),
        ("####\n18", 18),
        ("The answer is $18.00.", 18),
        ("**Answer:** 18", 18),
        ("Final Answer: **18**", 18),
        (r"The answer is:" "\n" r"\[ 1{,}234 \]", 1234),
    ],
)
def test_marked_answers(text, value):
    assert extract(text) == value


def test_the_last_number_of_latex():
    assert last_number(r"so 1{,}234") == 1234 and last_number(r"or \$18") == 18


def test_reading_takes_bounded_time():
    """Wrong implementations: patterns that try every way to cut a run of digits, braces or spaces."""
    example = Example(prompt="", fields={"answer": "1"})
    began = time.process_time()
    for part in (
        "1",
        "{",
        r"\boxed{",
        "1,111",
        r"\frac{1}{1}",
        "  ",
        "**",
        "10^",
        r"\text{",
        "####",
        "=",
        "1 1/",
    ):
        Gsm8k(last_number=True).verify(example, "#### " + part * 20_000)
        Gsm8k(last_number=True).verify(example, part * 20_000)
    assert time.process_time() - began < 3
