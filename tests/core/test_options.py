"""Options of a run: their values, their errors, their owners and their order in documents."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import pytest
from click.testing import CliRunner

from onnx_oamip.cli import cli
from onnx_oamip.cli.help import HEADINGS, Option
from onnx_oamip.core import options
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.options import (
    BudgetOptions,
    DataOptions,
    LimitOptions,
    Options,
    QuantisationOptions,
)
from onnx_oamip.core.settings import Settings

ORDER = """
    macs params size threshold latency max_drop importance mode formulation loss_weight score_budget relax
    images_per_class alpha signal granularity iterations sparse phi score_time allocate refit align floor limits
    protect exclude solver time_limit workers scheduler cache force strict device seed batch_size max_memory
    no_provenance image_size image_fit image_scale image_mean image_std image_layout image_color samples column
"""
"""Keys of ``settings`` in documents: a new one may be added anywhere."""


def test_order_of_settings_in_documents() -> None:
    keys = ORDER.split()
    assert [name for name in Settings().model_dump() if name in keys] == keys


def test_every_option_has_one_owner_and_a_description() -> None:
    owners = Settings.__bases__
    named = {getattr(options, name) for name in options.__all__}
    assert named - {Options, LimitOptions, QuantisationOptions} == set(owners)
    owned = [name for owner in owners for name in owner.model_fields]
    assert sorted(owned) == sorted(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        assert re.fullmatch(r"[A-Z].*[.]", field.description or ""), name
        assert Settings.owner(name) in owners


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("macs", "50%", 0.5),
        ("macs", "0.5", 0.5),
        ("size", " 25% ", 0.25),
        ("floor", "0", 0.0),
        ("max_drop", "5%", 5.0),
        ("max_drop", "0.5", 0.5),
        ("align", " auto ", "auto"),
        ("align", "8", 8),
        ("max_memory", "1.5 GiB", 3 << 29),
        ("max_memory", "800m", 800 << 20),
        ("max_memory", 1 << 30, 1 << 30),
        ("image_size", "224", (224, 224)),
        ("image_size", "224x320", (224, 320)),
        ("image_size", [224, 320], (224, 320)),
        ("image_mean", "0.4,50%,1", (0.4, 0.5, 1.0)),
        ("image_std", 2, (2.0,)),
        ("shape", "x=1x3x640x640", ("x=1x3x640x640",)),
        ("shape", ["a=b=2x3", "length=7"], ("a=b=2x3", "length=7")),
        ("shape", {"x": (1, 3), "length": 7, "y": "2x4"}, ("x=1x3", "length=7", "y=2x4")),
    ],
)
def test_values_are_read_as_on_the_command_line(name: str, text: object, value: object) -> None:
    assert getattr(Settings.create(**{name: text}), name) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"macs": 50}, "`macs`: 50 is not a share to keep; give a number above 0 and at most 1, "),
        ({"macs": "half"}, "`macs`: 'half' is not a share to keep; "),
        ({"size": math.nan}, "`size`: nan is not a share to keep; "),
        ({"max_drop": 100}, "`max_drop`: 100 is not a number of points; "),
        ({"threshold": math.inf}, "`threshold`: inf is not a number from 0; "),
        ({"protect": "100%"}, "`protect`: '100%' is not a share; give a number from 0 and below 1"),
        ({"align": 0}, "`align`: 0 is not an alignment; "),
        ({"align": "some"}, "`align`: 'some' is not an alignment; "),
        ({"max_memory": 1000}, "`max_memory`: 1000 is not an amount of memory; "),
        ({"image_size": "1x2x3"}, "`image_size`: '1x2x3' is not a size in pixels; "),
        ({"image_size": "0"}, "`image_size`: '0' is not a size in pixels; "),
        ({"shape": ("x=1x0",)}, "`shape`: ('x=1x0',) is not a list of shapes; "),
        ({"shape": "=1"}, "`shape`: '=1' is not a list of shapes; "),
        ({"image_std": "0"}, "`image_std`: '0' is not a list of numbers above 0; "),
        ({"image_mean": ()}, r"`image_mean`: () is not a list of numbers; "),
        ({"exclude": "w1"}, "`exclude`: 'w1' is not a list of patterns; "),
        ({"scheduler": ""}, "`scheduler`: '' is not an address; "),
        ({"workers": 0}, "`workers`: 0 is not a whole number from 1; "),
        ({"time_limit": math.nan}, "`time_limit`: nan is not a number of seconds above 0; "),
        ({"allocate": "best"}, "`allocate`: 'best' is not one of 'mip', 'global', 'uniform'."),
        ({"task": "boxes"}, "`task`: 'boxes' is not one of 'classes', 'binary', 'values', 'emb"),
        ({"relax": "maybe"}, "`relax`: 'maybe' is not true or false."),
        ({"mcas": 0.5}, "there is no setting `mcas`; did you mean `macs`?"),
        ({"qwertz": 0.5}, "there is no setting `qwertz`."),
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(**values)
    text = str(caught.value)
    assert text.startswith(message)
    assert re.fullmatch(r"[^.]+(\d\.\d[^.]*)*[.?]", text), text


def test_an_owner_alone_checks_its_options() -> None:
    assert BudgetOptions(macs="50%").budget.macs == 0.5
    with pytest.raises(SettingsError, match="there is no setting `seed`"):
        DataOptions(seed=1)


def test_settings_are_the_same_in_another_process() -> None:
    settings = Settings(macs=0.5, exclude=("w*",), image_size="224")
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_settings_without_budget() -> None:
    settings = Settings(macs=0.5, max_drop=1.0, alpha=0.9, seed=3)
    assert settings.without_budget == Settings(alpha=0.9, seed=3)


@pytest.mark.parametrize("command", cli.commands.values(), ids=cli.commands)
def test_options_are_under_known_headings(command: Any) -> None:
    found = [p.heading for p in command.params if isinstance(p, Option)]
    assert set(found) <= set(HEADINGS)


def test_help_of_prune_is_grouped() -> None:
    shown = CliRunner().invoke(cli, ["prune", "--help"]).output
    headings = re.findall(r"^(\S.*):$", shown, re.MULTILINE)
    of_prune = [heading for heading in HEADINGS if heading != "Quantisation"]  # of int8
    assert headings == [*of_prune, "Examples"]
    budget = shown.split("Budget:")[1].split("What to remove:")[0]
    for name in BudgetOptions.model_fields:
        assert re.search(rf"^  --{name.replace('_', '-')} ", budget, re.MULTILINE), name
    assert "[default: 1/255]" in " ".join(shown.split())
