"""A recipe to an adapter folder: each module's result made, written and forgotten, so that memory holds one module.

The folder is a cache entry of the recipe: its `recipe.json` names base, parents by digest, method, weights, seed and
code, and the digest of that is its identity. The same recipe gives the same bytes; asked for again it is found.
"""

import importlib.metadata
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.adapters.adapter_folder import (
    AdapterFolder,
    CanonicalWriter,
    adapter_digest,
    common_targets,
    copy_companions,
    open_adapter,
)
from qlora_core.adapters.dense_rules import approximate, dare, dare_ties, seed_of, ties
from qlora_core.adapters.forgetting import Task, forgetting
from qlora_core.adapters.ingredient import Ingredient
from qlora_core.adapters.lineage import check_chain, check_parents_present, common_base
from qlora_core.adapters.low_rank import Compressed, LowRank, compress, concatenate
from qlora_core.adapters.on_base import check_on_base, write_golden_of
from qlora_core.config.recipe import PRUNING_METHODS, RecipeConfig, load_recipe
from qlora_core.digest import digest_files, digest_json
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.adapter import PARENTS_KEY, PROVENANCE_FILE
from qlora_core.quantization.checkpoint import checkpoint_files
from qlora_core.store.manifest import DISTRIBUTION

RECIPE_FILE = "recipe.json"
CODE_VERSION = 1
"""Of the rules in this package: raised whenever the same recipe would give other numbers."""


def compose(recipe_file: Path, out: Path) -> dict[str, Any]:
    """Make the adapter of a recipe file in the new folder `out`, which appears whole or not at all.

    Returns {"adapter", "weights" (by name), "recipe" (identity), "rank", "modules", "relative_error" (what TIES',
    DARE's or compression's SVD lost, over the norm of the whole; 0 for exact methods), "norm", "cached", "learned" (see
    `learn_weights`), "forgetting" (see there; for adapters with a task)}. A folder that holds the same recipe's result
    is returned as it is.

    Raises:
        ConfigError: the recipe has mistakes, or `out` holds something else. ModelError: an adapter cannot be used, does
        not fit the base, or lacks a parent.
    """
    recipe = load_recipe(recipe_file)
    ingredients = _gather(recipe, recipe_file.parent)
    base = None if recipe.base is None else recipe_file.parent / recipe.base
    check_on_base(base, [each.adapter for each in ingredients])
    identity = _identity(recipe, recipe_file.parent, ingredients, base)
    found = _found(out, identity)
    if found is not None:
        return found
    learned = None
    if recipe.learn is not None and base is not None:
        from qlora_core.adapters.learn import learn_weights

        learned = learn_weights(base, ingredients, recipe.learn, recipe_file.parent)
        ingredients = learned.ingredients
    report = None if learned is None else learned.report
    tasks = _tasks(recipe, recipe_file.parent, ingredients)
    return _make(_Order(recipe, ingredients, base, tasks, identity, report), out)


def compose_module(recipe: RecipeConfig, ingredients: Sequence[Ingredient], module: str) -> Compressed:
    """The result on one module, by the recipe's method, with its SVD's error (0 where there is none)."""
    here = [each for each in ingredients if module in each.adapter.modules and each.weight_on(module) != 0]
    if not here:
        shape = next(each.adapter.factors(module).shape for each in ingredients if module in each.adapter.modules)
        return Compressed(_zero(shape), 0.0, 0.0)
    if recipe.method in PRUNING_METHODS:
        return approximate(_pruned(recipe, here, module), _rank(recipe, ingredients))
    sign = -1.0 if recipe.method == "negate" else 1.0
    whole = concatenate([(each.adapter.factors(module), sign * each.weight_on(module)) for each in here])
    if recipe.rank is not None:
        return compress(whole, recipe.rank)
    return Compressed(whole, 0.0, whole.norm())


def _gather(recipe: RecipeConfig, folder: Path) -> list[Ingredient]:
    ingredients: list[Ingredient] = []
    for parent in recipe.adapters:
        path = folder / Path(parent.path).expanduser()
        adapter = open_adapter(path, expected_digest=parent.digest)
        name = parent.name or path.resolve().name
        if name in [each.name for each in ingredients]:
            raise ConfigError(f"two adapters of the recipe are called {name!r}; give one another `name`")
        ingredients.append(Ingredient(name, adapter, 1.0 if parent.weight is None else parent.weight))
    adapters = [each.adapter for each in ingredients]
    check_parents_present(adapters)
    if recipe.method == "sequential":
        check_chain(adapters)
    if all(each.weight == 0 for each in ingredients):
        raise ConfigError("every weight of the recipe is 0, which is the base itself; give one another value")
    return ingredients


def _identity(
    recipe: RecipeConfig, folder: Path, ingredients: Sequence[Ingredient], base: Path | None
) -> dict[str, Any]:
    settings: dict[str, Any] = {"method": recipe.method, "rank": recipe.rank}
    if recipe.method in PRUNING_METHODS:
        settings["density"] = recipe.density
    if recipe.method.startswith("dare"):
        settings["seed"] = recipe.seed
    if recipe.learn is not None:
        texts = {name: folder / getattr(recipe.learn, name) for name in ("validation", "test")}
        settings["learn"] = recipe.learn.model_dump(mode="json") | {"texts": _digest_texts(texts)}
    return {
        "format": 1,
        **settings,
        "base": {
            **common_base([each.adapter for each in ingredients]),
            "checkpoint_digest": None if base is None else digest_files(checkpoint_files(base)),
        },
        "parents": [
            {"digest": each.adapter.digest, "weight": each.weight, "recipe": _recipe_of(each.adapter)}
            for each in ingredients
        ],
        "code": {"compose": CODE_VERSION, DISTRIBUTION: importlib.metadata.version(DISTRIBUTION)},
    }


def _digest_texts(texts: Mapping[str, Path]) -> str:
    missing = [str(path) for path in texts.values() if not path.is_file()]
    if missing:
        raise ConfigError(f"learn names {missing[0]}, which is no file; name UTF-8 texts")
    return digest_files(texts)


def _recipe_of(adapter: AdapterFolder) -> dict[str, Any] | None:
    """A composed parent's own recipe, whole, so that every composition can be taken apart down to what was trained."""
    file = adapter.path / RECIPE_FILE
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8"))["recipe"]


def _found(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    file = out / RECIPE_FILE
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["id"] == digest_json(identity) and kept["adapter_digest"] == adapter_digest(out):
            return {**kept["result"], "adapter": str(out), "cached": True}
    raise ConfigError(f"{out} exists and is not this recipe's result; name a new folder, or remove it first")


@dataclass(frozen=True)
class _Order:
    recipe: RecipeConfig
    ingredients: Sequence[Ingredient]
    base: Path | None
    tasks: Sequence[Task]
    identity: dict[str, Any]
    learned: dict[str, Any] | None


def _make(order: _Order, out: Path) -> dict[str, Any]:
    stage = out.with_name(f".{out.name}.staging")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        errors = _write(order.recipe, order.ingredients, stage)
        result = {
            "weights": {each.name: each.weight for each in order.ingredients},
            "recipe": digest_json(order.identity),
            "learned": order.learned,
            "forgetting": forgetting(order.base, stage, order.tasks) if order.base and order.tasks else [],
            **errors,
        }
        _write_cards(stage, order.ingredients, order.identity, result)
        if order.base is not None:
            write_golden_of(order.base, stage, [each.adapter.path for each in order.ingredients])
        if out.exists():
            out.rmdir()
        stage.replace(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return {**result, "adapter": str(out), "cached": False}


def _tasks(recipe: RecipeConfig, folder: Path, ingredients: Sequence[Ingredient]) -> list[Task]:
    """Each adapter with a task, under the parents it was trained on."""
    by_digest = {each.adapter.digest: each.adapter.path for each in ingredients}
    tasks = []
    for parent, each in zip(recipe.adapters, ingredients, strict=True):
        if parent.task is not None:
            below = [by_digest[digest] for digest in each.adapter.provenance.get(PARENTS_KEY) or []]
            tasks.append(Task(each.name, (*below, each.adapter.path), folder / parent.task))
    return tasks


def _write(recipe: RecipeConfig, ingredients: Sequence[Ingredient], folder: Path) -> dict[str, Any]:
    modules = sorted({module for each in ingredients for module in each.adapter.modules})
    rank = _rank(recipe, ingredients)
    squares = {"error": 0.0, "norm": 0.0}
    by_module: dict[str, float] = {}

    def make(module: str) -> LowRank:
        found = compose_module(recipe, ingredients, module)
        squares["error"] += found.error**2
        squares["norm"] += found.norm**2
        by_module[module] = found.error / found.norm if found.norm else 0.0
        return found.kept

    CanonicalWriter(modules, rank, common_targets([each.adapter for each in ingredients]), make).write(folder)
    if not squares["norm"]:
        raise ModelError("the composition cancels to zero; it is the base itself, look at the weights")
    relative = math.sqrt(squares["error"] / squares["norm"])
    return {
        "rank": rank,
        "modules": len(modules),
        "norm": math.sqrt(squares["norm"]),
        "relative_error": relative,
        "error_by_module": by_module if relative else {},
    }


def _write_cards(
    folder: Path, ingredients: Sequence[Ingredient], identity: Mapping[str, Any], result: Mapping[str, Any]
) -> None:
    content = {"id": digest_json(identity), "recipe": identity, "names": [each.name for each in ingredients]}
    content |= {"adapter_digest": adapter_digest(folder), "result": dict(result)}
    (folder / RECIPE_FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    shared = {
        key: value
        for key, value in ingredients[0].adapter.provenance.items()
        if all(each.adapter.provenance.get(key) == value for each in ingredients)
        and key in ("quantized_base_digest", "base_revision", "chat_template_origin", "precision", "data_digest")
    }
    card = shared | {"recipe": digest_json(identity)}
    (folder / PROVENANCE_FILE).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_companions(ingredients[0].adapter.path, folder)


def _pruned(recipe: RecipeConfig, here: Sequence[Ingredient], module: str) -> Any:
    parts = [
        (lambda each=each: each.adapter.factors(module).dense(), each.weight_on(module))
        for each in here
    ]  # fmt: skip
    if recipe.method == "ties":
        return ties(parts, recipe.density)
    seeds = [seed_of(recipe.seed, each.adapter.digest, module) for each in here]
    return (dare if recipe.method == "dare" else dare_ties)(parts, recipe.density, seeds)


def _rank(recipe: RecipeConfig, ingredients: Sequence[Ingredient]) -> int:
    """What the result's modules are padded to: the asked-for rank, else the largest sum of ranks on a module."""
    modules = {module for each in ingredients for module in each.adapter.modules}
    summed = max(sum(each.adapter.rank(module) for each in ingredients) for module in modules)
    return summed if recipe.rank is None else recipe.rank


def _zero(shape: tuple[int, int]) -> LowRank:
    import torch

    return LowRank(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0))
