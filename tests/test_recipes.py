"""Every recipe can be planned, and says what it needs and what it took."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift.config.bind import resolve
from swift.plan.plan import make_plan

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_planned(recipe: Path) -> None:
    plan = make_plan(resolve("sft", [str(recipe)])).to_dict()
    assert plan["command"] == "sft"
    assert plan["config"]["data"]["dataset"]
    assert recipe.name in str(plan["sources"]["learning_rate"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_takes(recipe: Path) -> None:
    head = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(line.startswith("# Measured") for line in head)
    assert any(line.startswith("# Data and model") for line in head)
    assert f"({recipe.name})" in (recipe.parent / "README.md").read_text(encoding="utf-8")
