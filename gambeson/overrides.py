"""Every field of a recipe from the command line: `--generation.count 8000`, `--generation.sampler DDIM`.

The recipe becomes its plain tree, the words edit that tree, and files.build checks the result: the command line is
an edited file. tyro reads the words and writes the help, one flat option per field; types and errors are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, TypeVar

from gambeson.canonical import components, field_help, hints, name_of, plain, type_text
from gambeson.errors import UserError, nearest, unknown
from gambeson.files import build, from_text

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spot:
    """One place of a recipe that an option can set: a leaf, or a choice of components."""

    path: str
    hint: Any
    value: Any  # plain form
    help: str
    kinds: tuple[type, ...] = ()  # the components that may stand here; none for a leaf
    many: bool = False  # whether it holds several components

    @property
    def type_text(self) -> str:
        """The type in words: 'int', 'Heun or DDIM', 'several of PGD or APGD'."""
        return type_text(self.hint)

    @property
    def default_words(self) -> list[str]:
        """The words one would type to get the value that stands here."""
        return [_typed(v) for v in self.value] if isinstance(self.value, list) else [_typed(self.value)]

    @property
    def default_text(self) -> str:
        """The default on one line."""
        return " ".join(self.default_words)


def _typed(value: Any) -> str:
    """A plain value as one would type it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else value["class"] if isinstance(value, dict) else str(value)


def _spots(tree: Mapping[str, Any], cls: type, prefix: str = "") -> Iterator[Spot]:
    """The spots of a plain tree whose root is a `cls`, in the order of its fields."""
    for name, hint in hints(cls).items():
        spot = Spot(path=prefix + name, hint=hint, value=tree[name], help=field_help(cls).get(name, ""))
        kinds, many = components(hint)
        if not kinds or many or len(kinds) > 1:
            yield dataclasses.replace(spot, kinds=kinds, many=many)
        inside = enumerate(spot.value) if many else [("", spot.value)]
        for index, child in inside if kinds else ():
            yield from _below(child, kinds, f"{spot.path}.{index}." if many else f"{spot.path}.")


def _below(child: Mapping[str, Any] | None, kinds: Sequence[type], prefix: str) -> Iterator[Spot]:
    """The spots inside one component."""
    if child is not None:
        cls = next(kind for kind in kinds if name_of(kind) == child["class"])
        yield from _spots(child, cls, prefix)


def flat_fields(recipe: Any) -> list[tuple[str, str, str, str]]:
    """(path, type, default, help) in words for every field and every choice of components of the recipe."""
    return [(s.path, s.type_text, s.default_text, s.help) for s in _spots(plain(recipe), type(recipe))]


def _metavar(spot: Spot) -> str:
    """The type of a spot as help shows it after the option: 'int', 'Heun|DDIM', 'int ...'."""
    words = spot.type_text.replace(" or ", "|")
    return words.removeprefix("several of ") + " ..." if words.startswith("several of ") else words


@dataclasses.dataclass(frozen=True)
class _Words:
    """The words of one option; not given: the default, as help shows it."""

    words: tuple[str, ...]
    given: bool = True


def _option(spot: Spot) -> tuple[str, Any, Any]:
    """The field of tyro's dataclass for one spot. It takes any words: what they mean is checked by us, later."""
    import tyro

    reader = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=_metavar(spot),
        instance_from_str=lambda words: _Words(tuple(words)),
        is_instance=lambda value: isinstance(value, _Words),
        str_from_instance=lambda value: list(value.words),
    )
    hint = Annotated[_Words, reader, tyro.conf.arg(name=spot.path, help=spot.help)]
    default = _Words(tuple(spot.default_words), given=False)
    return spot.path.replace(".", "__"), hint, dataclasses.field(default=default)


def _section(name: str, spots: Sequence[Spot]) -> tuple[str, Any, Any]:
    """One box of the help: the spots below one field of the recipe."""
    if len(spots) == 1:
        return _option(spots[0])
    cls = dataclasses.make_dataclass(name, map(_option, spots), frozen=True)
    return name, cls, dataclasses.field(default=cls())


def _options(spots: Sequence[Spot]) -> type:
    """The dataclass from which tyro reads the words and writes the help."""
    sections: dict[str, list[Spot]] = {}
    for spot in spots:
        sections.setdefault(spot.path.partition(".")[0], []).append(spot)
    return dataclasses.make_dataclass("Options", [_section(n, s) for n, s in sections.items()], frozen=True)


def _about(spots: Sequence[Spot], prog: str) -> str:
    """What stands above the options in the help."""
    choice = next((s for s in spots if len(s.kinds) > 1 and not s.many), None)
    text = "Every field of the recipe with its default."
    if choice is None:
        return text
    other = next(name_of(k) for k in choice.kinds if name_of(k) != choice.default_text)
    return (
        f"{text}\n\nAn option that takes class names chooses a component. To see that component's own options, say:\n\n"
        f"{prog} --{choice.path} {other} --help"
    )


def _read(
    spots: Sequence[Spot], argv: Sequence[str], prog: str, add_help: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """The words given for each path, and the words that belong to no option."""
    import tyro

    options, strangers = tyro.cli(
        _options(spots),
        prog=prog,
        description=_about(spots, prog),
        args=argv,
        return_unknown_args=True,
        use_underscores=True,
        add_help=add_help,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    boxes = [value for value in vars(options).values() if not isinstance(value, _Words)]
    read = {name: words for box in [options, *boxes] for name, words in vars(box).items()}
    found = {spot.path: read[spot.path.replace(".", "__")] for spot in spots}
    return {path: list(option.words) for path, option in found.items() if option.given}, strangers


def _place(tree: Any, path: str, value: Any) -> None:
    """tree.path = value, in place."""
    *above, name = path.split(".")
    for step in above:
        tree = tree[int(step) if isinstance(tree, list) else step]
    tree[name] = value


def _value(spot: Spot, words: Sequence[str]) -> Any:
    """The plain value that the words mean for a leaf; a lone `--flag` is true."""
    try:
        return from_text(words or ["true"] * (spot.hint is bool), spot.hint, f"--{spot.path}")
    except UserError as error:
        raise UserError(
            f"{error}. It is: {spot.help or spot.path}; without this option it is {spot.default_text}"
        ) from None


def _chosen(spot: Spot, words: Sequence[str]) -> Any:
    """The plain form of the components named by the words; one that stands there already keeps its values."""
    named = {name_of(kind): kind for kind in spot.kinds}
    words = ["none" if word == "None" else word for word in words]
    for word in words:
        if word not in named:
            raise UserError(f"--{spot.path}: {unknown('component', word, named)}")
    if len(words) != 1 and not spot.many:
        raise UserError(f"--{spot.path}: expected one of {', '.join(named)}, got {' '.join(words) or 'nothing'}")
    old = spot.value if spot.many else [spot.value]
    new = [old[i] if i < len(old) and _typed(old[i]) == w else plain(named[w]()) for i, w in enumerate(words)]
    return new if spot.many else new[0]


def _choose(tree: dict[str, Any], spots: Sequence[Spot], given: Mapping[str, Sequence[str]]) -> bool:
    """Puts the first chosen component that is not there yet into the tree; False if all of them are."""
    for spot in spots:
        if spot.kinds and spot.path in given:
            chosen = _chosen(spot, given[spot.path])
            if chosen != spot.value:
                _place(tree, spot.path, chosen)
                return True
    return False


def _owner(path: str, spots: Sequence[Spot]) -> str:
    """If an unknown path would be a field of another component: how to choose that component."""
    for spot in spots:
        name = path.removeprefix(f"{spot.path}.").partition(".")[0]
        for kind in spot.kinds if path.startswith(f"{spot.path}.") and not spot.many else ():
            if kind is not NoneType and name in hints(kind):
                return f"; {name} is a field of {name_of(kind)}: add --{spot.path} {name_of(kind)}"
    return ""


def _stranger(word: str, spots: Sequence[Spot], prog: str) -> UserError:
    """The error for a word that belongs to no option."""
    if not word.startswith("--"):
        return UserError(f"expected options, --NAME VALUE, got the word {word!r}; `{prog} --help` lists them")
    path = word[2:].partition("=")[0].replace("-", "_")
    likely = ", ".join(f"--{known}" for known in nearest(path, [s.path for s in spots])[:3])
    fix = _owner(path, spots) or f"; `{prog} --help` lists all"
    return UserError(f"unknown option --{path}: expected a field of the recipe, nearest: {likely}{fix}")


def parse(default: T, argv: Sequence[str], prog: str) -> T:
    """The recipe `default` with the options of the command line applied; `prog` is how help and errors call us.

    `--path.to.field VALUE` sets a leaf ('8/255' and '1e-3' are floats, 'none' is None, a tuple takes several words),
    `--path.to.component CLASS` puts that class with its defaults there (several words for a tuple of components,
    whose own fields are `--path.0.field`). --help prints every field and exits with 0.
    Raises UserError: what was expected, what came, the fix.
    """
    if not argv:
        return default
    tree, cls = plain(default), type(default)
    while True:
        spots = list(_spots(tree, cls))
        given, strangers = _read(spots, argv, prog, add_help=False)
        if not _choose(tree, spots, given):
            break
    if {"--help", "-h"} & set(argv):
        _read(spots, ["--help"], prog, add_help=True)
    if strangers:
        raise _stranger(strangers[0], spots, prog)
    for spot in spots:
        if spot.path in given and not spot.kinds:
            _place(tree, spot.path, _value(spot, given[spot.path]))
    return build(tree, cls)
