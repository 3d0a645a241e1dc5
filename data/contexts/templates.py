"""Forms of contexts: how names become a text, in English and Chinese; other languages have bare lists only.

Every kind of context uses the same forms, and keywords stand at random places, so that neither tells which names are
spoken. A template takes all {names} at once, or one {name} an item; an edit says what the right {name} replaced.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Templates(NamedTuple):
    """What one language says. `comma` joins names, `stop` items."""

    comma: str
    stop: str
    whole: dict[str, tuple[str, ...]]
    items: dict[str, tuple[str, ...]]
    edits: tuple[str, ...]
    turns: tuple[str, ...]  # what was said before, with the answer
    slots: dict[str, tuple[str, ...]]


FORMS = ("list", "contacts", "titles", "places", "description", "agenda", "dialogue", "edits")
SENTENCES = ("description", "agenda", "dialogue", "edits")  # what a language model is asked to write

ONE_BY_ONE = ("agenda", "dialogue")

ENGLISH = Templates(
    comma=", ",
    stop="; ",
    whole={
        "contacts": (
            "contacts: {names}",
            "address book: {names}",
            "people in this group: {names}",
            "the contact list has {names}",
        ),
        "titles": ("titles: {names}", "mentioned in this document: {names}", "subjects: {names}", "recent: {names}"),
        "places": ("nearby: {names}", "on the map: {names}", "saved places: {names}", "along the route: {names}"),
        "description": (
            "the speaker often mentions {names}",
            "this assistant helps somebody who knows {names}",
            "background: the conversation is about {names}",
            "these came up recently: {names}",
            "a personal assistant; its owner has dealings with {names}",
        ),
    },
    items={
        "agenda": (
            "{day}: {name}",
            "{day}, {activity} with {name}",
            "{name} {day}",
            "{day} {activity}, {name}",
            "to do {day}: {name}",
        ),
        "dialogue": (
            "user: do you know {name} assistant: yes, {name}",
            "user: look for {name} assistant: found {name}",
            "assistant: did you mean {name} user: yes, {name}",
            "user: what about {name} assistant: nothing new",
            "assistant: last time it was {name}",
        ),
    },
    edits=(
        "the user corrected {wrong} to {name}",
        "{wrong} was replaced by {name}",
        "changed {wrong} into {name}",
        "not {wrong} but {name}",
        "spelling: {name}, not {wrong}",
    ),
    turns=("user: {turn} assistant: {reply}", "earlier: {turn}", "the user said: {turn}"),
    slots={
        "day": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
        "activity": ("meeting", "lunch", "visit", "appointment", "walk", "interview"),
        "reply": ("done", "all right", "okay", "sure", "of course", "anything else"),
    },
)

CHINESE = Templates(
    comma="、",
    stop="；",
    whole={
        "contacts": ("联系人：{names}", "通讯录：{names}", "群成员：{names}"),
        "titles": ("标题：{names}", "文中提到：{names}", "最近：{names}"),
        "places": ("附近：{names}", "地图上有{names}", "收藏的地点：{names}"),
        "description": ("说话人常提到{names}", "背景：对话与{names}有关", "最近出现过：{names}"),
    },
    items={
        "agenda": ("{day}：{name}", "{day}{activity}，{name}", "待办{day}：{name}"),
        "dialogue": ("用户：找{name} 助手：找到{name}", "助手：是{name}吗 用户：对，{name}", "助手：上次是{name}"),
    },
    edits=("用户把{wrong}改成了{name}", "{wrong}更正为{name}", "是{name}，不是{wrong}"),
    turns=("用户：{turn} 助手：{reply}", "之前：{turn}"),
    slots={
        "day": ("周一", "周二", "周三", "周四", "周五", "周六", "周日"),
        "activity": ("开会", "午餐", "拜访", "散步", "面试"),
        "reply": ("好的", "完成", "没问题", "还有吗"),
    },
)

LANGUAGES = {"en": ENGLISH, "zh": CHINESE}


def templates_of(lang: str) -> Templates | None:
    """Return the templates of a language tag such as en or zh-CN; None where there are none."""
    return LANGUAGES.get(lang.lower().replace("_", "-").partition("-")[0])


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    # random() is the one method whose values Python promises to keep.
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda _: rng.random())


def weighted(rng: random.Random, shares: dict[str, float]) -> str:
    """Draw a key; the shares add up to one."""
    drawn = rng.random()
    for key, share in shares.items():
        drawn -= share
        if drawn < 0:
            return key
    return next(reversed(shares))


def written(form: str, rng: random.Random, *, core: Sequence[str], others: Sequence[str], lang: str) -> str:
    """Return a text in which all of `core` and `others` occur. A form that the language has not becomes a bare list."""
    templates = templates_of(lang)
    names = shuffled(rng, [*core, *others])
    if templates is None or form == "list":
        return (templates.comma if templates else ", ").join(names)
    if form in templates.whole:
        return pick(rng, templates.whole[form]).format(names=templates.comma.join(names))
    if form == "edits":
        return _edits(templates, rng, core=core, others=others)
    return _items(templates, templates.items[form], rng, names)


def _items(templates: Templates, choices: Sequence[str], rng: random.Random, names: Sequence[str]) -> str:
    items = []
    for name in names:
        slots = {slot: pick(rng, words) for slot, words in templates.slots.items()}
        items.append(pick(rng, choices).format(name=name, **slots))
    return templates.stop.join(items)


def _edits(templates: Templates, rng: random.Random, *, core: Sequence[str], others: Sequence[str]) -> str:
    """The core is what was right; what it replaced are the first of the others. Whatever is left has no partner."""
    right, wrong = list(core), list(others)
    while len(right) < len(wrong):
        right.append(wrong.pop())
    items = [pick(rng, templates.edits).format(name=name, wrong=bad) for name, bad in zip(right, wrong)]
    return templates.stop.join(shuffled(rng, [*items, *right[len(wrong) :]]))


def written_turns(rng: random.Random, turns: Sequence[str], *, lang: str) -> str:
    """Return earlier turns as a dialogue history."""
    templates = templates_of(lang)
    if templates is None:
        return ". ".join(turns)
    replies = templates.slots["reply"]
    items = [pick(rng, templates.turns).format(turn=turn, reply=pick(rng, replies)) for turn in turns]
    return templates.stop.join(items)
