"""How values are written, on the command line and in files."""

import pytest

from tuning.samplers import Range, Values, from_plain, from_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4,8,16", Values((4, 8, 16))),
        ("prompt,token", Values(("prompt", "token"))),
        ("true,false", Values((True, False))),
        ("2e-3", Values((2e-3,))),
        ("choice:1,2", Values((1, 2), "choice")),
        ("grid:1,2", Values((1, 2), "grid")),
        ("loguniform:1e-4:1e-2", Range("loguniform", 1e-4, 1e-2)),
        ("uniform:0:1", Range("uniform", 0, 1)),
        ("randint:4:65", Range("randint", 4, 65)),
        (r"model\.layers:x", Values((r"model\.layers:x",))),
    ],
)
def test_values_of_a_command_line(text, expected):
    assert from_text(text) == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ([4, 8], Values((4, 8))),
        (0.5, Values((0.5,))),
        ({"loguniform": [1.0e-4, 1.0e-2]}, Range("loguniform", 1e-4, 1e-2)),
        ({"choice": [1, 2]}, Values((1, 2), "choice")),
        ("lograndint:2:9", Range("lograndint", 2, 9)),
    ],
)
def test_values_of_a_file(entry, expected):
    assert from_plain(entry) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give one or more values"),
        ("4,,8", "give one or more values"),
        ("4,4", "4 is there twice"),
        ("normal:0:1", "no sampler 'normal'; there are: choice, grid, uniform"),
        ("uniform:1", "write it as uniform:LOW:HIGH"),
        ("uniform:a:b", "write it as uniform:LOW:HIGH"),
        ("uniform:2:1", "a lower and an upper end, found 2 and 1"),
        ("uniform:0:.inf", "a lower and an upper end"),
        ("loguniform:0:1", "a lower end above 0"),
        ("randint:1.5:3", "whole numbers"),
        ("[1", "not valid YAML"),
    ],
)
def test_what_cannot_be_meant_is_said(text, message):
    with pytest.raises(ValueError, match="(?i)" + message.replace("[", r"\[")):
        from_text(text)


def test_a_range_of_whole_numbers_leaves_its_upper_end_out():
    assert from_text("randint:4:65").tried == (4, 64)


def test_what_is_tried_of_a_range_is_both_ends_and_a_fraction():
    low, within, high = Range("loguniform", 4, 64).tried
    assert (low, high) == (4, 64)
    assert low < within < high
    assert not float(within).is_integer()
