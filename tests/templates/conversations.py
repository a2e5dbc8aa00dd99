"""Conversations of every shape that templates treat apart, by name."""

from __future__ import annotations

from typing import Any


def user(content: str = "What is 2 + 2?", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def system(content: str = "You are terse.", **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": content, **more}


def reply(content: str | None = "It is 4.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str = "weather", arguments: Any = None, **more: Any) -> dict[str, Any]:
    arguments = {"city": "Lisbon", "days": 2} if arguments is None else arguments
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def calls(*made: dict[str, Any], content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(made), **more}


def result(content: str = '{"sky": "clear"}', **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def tool(name: str = "weather") -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    return {
        "type": "function",
        "function": {"name": name, "description": f"Tells the {name}.", "parameters": parameters},
    }


THOUGHT = {"reasoning_content": "Two and two make four."}
ID = {"id": "call00001"}
OF_ID = {"tool_call_id": "call00001", "name": "weather"}
TOOLS = [tool(), tool("clock")]

PLAIN: dict[str, list[dict[str, Any]]] = {
    "one turn": [user(), reply()],
    "with a system prompt": [system(), user(), reply()],
    "empty system prompt": [system(""), user(), reply()],
    "two turns": [user(), reply(), user("And 3 + 3?"), reply("6")],
    "two turns, system": [system(), user(), reply(), user("And 3 + 3?"), reply("6")],
    "five turns": [m for n in range(5) for m in (user(f"Say {n}."), reply(f"{n}."))],
    "the same reply twice": [user("Say hi"), reply("hi"), user("Say hi"), reply("hi")],
    "reply equals question": [user("echo"), reply("echo")],
    "reply is the role's name": [user("Who are you?"), reply("assistant")],
    "ends with the user": [user(), reply(), user("Thanks")],
    "begins with the assistant": [reply("Hello, what can I do?"), user(), reply()],
    "two replies in a row": [user(), reply("First."), reply("Second.")],
    "two users in a row": [user("Listen."), user(), reply()],
    "one letter": [user("a"), reply("b")],
    "empty reply": [user(), reply("")],
    "empty question": [user(""), reply()],
    "spaces around": [user("  hi  "), reply("  hello  ")],
    "newlines around": [user("\nhi\n"), reply("\nhello\n")],
    "reply begins with blank lines": [user(), reply("\n\nhello")],
    "reply is spaces": [user(), reply("   ")],
    "several lines": [user("List\n\n- a\n- b"), reply("# Title\n\n1. a\n2. b\n\n```py\nx = {'a': 1}\n```")],
    "other scripts": [user("你好，世界"), reply("مرحبا بالعالم 👩‍👩‍👧 é")],
    "decomposed accents": [user("e\u0301"), reply("o\u0308 ﬁ")],
    "html and quotes": [user("<b>\"a\" & 'b'</b>"), reply("<p>&lt;</p>")],
    "braces of templates": [user("{{ x }}"), reply("{% raw %}{{ y }}")],
    "brackets like markers": [user("[INSTR] hi [/INSTR"), reply("### Response:\nno")],
    "a long reply": [user("Go on."), reply("word " * 300 + "end")],
    "null content nowhere else": [system(), user(), reply("yes"), user("sure?"), reply("yes", name=None)],
    "names": [user("hi", name="Ann"), reply("hello Ann")],
    "weights": [user(), reply(weight=0.0), user("And now?"), reply("Now 4.", weight=0.5)],
    "think tags in the content": [user(), reply("<think>\nhm\n</think>\n\nIt is 4.")],
    "think tags, two turns": [
        user(),
        reply("<think>\nhm\n</think>\n\n4"),
        user("3+3"),
        reply("<think>\nok\n</think>\n\n6"),
    ],
    "an unclosed think tag": [user(), reply("<think> is a tag")],
    "reasoning": [user(), reply(**THOUGHT)],
    "reasoning, two turns": [user(), reply(**THOUGHT), user("And 3 + 3?"), reply("6", **THOUGHT)],
    "reasoning in the first turn only": [user(), reply(**THOUGHT), user("And 3 + 3?"), reply("6")],
    "reasoning, system": [system(), user(), reply(**THOUGHT)],
    "empty reasoning": [user(), reply(reasoning_content="")],
    "thinking by that name": [user(), reply(thinking="Two and two.")],
}

WITH_TOOLS: dict[str, list[dict[str, Any]]] = {
    "tools unused": [user(), reply()],
    "a call": [user("Weather?"), calls(call(**ID))],
    "a call and its result": [user("Weather?"), calls(call(**ID)), result(**OF_ID), reply("Clear.")],
    "a call with content": [
        user("Weather?"),
        calls(call(**ID), content="Let me look."),
        result(**OF_ID),
        reply("Clear."),
    ],
    "a call without content": [
        user("Weather?"),
        calls(call(**ID), content=None),
        result(**OF_ID),
        reply("Clear."),
    ],
    "parallel calls": [
        user("Weather and time?"),
        calls(call(**ID), call("clock", {"zone": "WET"}, id="call00002")),
        result(**OF_ID),
        result("12:00", tool_call_id="call00002", name="clock"),
        reply("Clear, and noon."),
    ],
    "two steps of calls": [
        user("Weather, then time?"),
        calls(call(**ID)),
        result(**OF_ID),
        calls(call("clock", {"zone": "WET"}, id="call00002")),
        result("12:00", tool_call_id="call00002", name="clock"),
        reply("Clear, and noon."),
    ],
    "string arguments": [
        user("Weather?"),
        calls(call(arguments='{"city": "Lisbon"}', **ID)),
        result(**OF_ID),
        reply("Clear."),
    ],
    "no arguments": [user("Time?"), calls(call("clock", {}, **ID)), result("12:00", **OF_ID), reply("Noon.")],
    "nested arguments": [
        user("Plan"),
        calls(call("plan", {"stops": [{"at": "Lisbon", "ok": True}, None, 1.5], "note": 'a\n"b"'}, **ID)),
        result(**OF_ID),
        reply("Done."),
    ],
    "reasoning before a call": [
        user("Weather?"),
        calls(call(**ID), **THOUGHT),
        result(**OF_ID),
        reply("Clear.", **THOUGHT),
    ],
    "calls, then another turn": [
        system(),
        user("Weather?"),
        calls(call(**ID)),
        result(**OF_ID),
        reply("Clear."),
        user("Thanks"),
        reply("Welcome."),
    ],
}

ALL: dict[str, dict[str, Any]] = {
    **{name: {"messages": m} for name, m in PLAIN.items()},
    **{name: {"messages": m, "tools": TOOLS} for name, m in WITH_TOOLS.items()},
    "tools and a system prompt": {"messages": [system(), user(), reply()], "tools": TOOLS},
    "documents": {"messages": [user(), reply()], "documents": [{"title": "Sums", "text": "2 + 2 = 4"}]},
}

# What the matrix tries beside these: parts, images, nulls, switches, thoughts in other places.
MORE_PLAIN: dict[str, list[dict[str, Any]]] = {
    "reasoning in the last turn only": [user(), reply(), user("And 3 + 3?"), reply("6", **THOUGHT)],
    "a closing tag without its opening one": [user(), reply("two and two\n</think>\n\nIt is 4.")],
    "a thought in the content and in its field": [user(), reply("<think>\nhm\n</think>\n\n4", **THOUGHT)],
    "a question about tags": [user("What is </think> for?"), reply("It closes a thought.")],
    "a developer's message": [{"role": "developer", "content": "Be terse."}, user(), reply()],
    "a system prompt in the middle": [user(), reply(), system("Now shout."), user("And?"), reply("FOUR")],
    "a greeting, two turns": [reply("Hello!"), user(), reply(), user("And 3 + 3?"), reply("6")],
    "a greeting, system": [system(), reply("Hello!"), user(), reply()],
    "an answer of parts": [user(), reply([{"type": "text", "text": "It is 4."}])],
    "a question of parts": [
        user([{"type": "text", "text": "What is"}, {"type": "text", "text": " 2 + 2?"}]),
        reply(),
    ],
    "an image": [user([{"type": "image"}, {"type": "text", "text": "What is this?"}]), reply("A cat.")],
    "reprs in the texts": [user("{'a': [1, None]}"), reply("[{'type': 'text', 'text': 'no'}]")],
    "tags of tools in a reply": [user("How do I call?"), reply('Write {"name": "f", "arguments": {}}.')],
    "a thought of several lines": [user(), reply(reasoning_content="\n  Two and two\n\n  make four.\n")],
    "a thought in the content, system": [system(), user(), reply("<think>hm</think>It is 4.")],
    "a thought in the last content": [user(), reply(), user("3+3"), reply("<think>\nok\n</think>\n\n6")],
    "an empty thought in the content": [user(), reply("<think>\n\n</think>\n\nIt is 4.")],
    "thoughts, then a reply without": [user(), reply("<think>\nhm\n</think>\n\n4"), user("3+3"), reply("6")],
    "a long chat with a system prompt": [
        system(),
        *(m for n in range(4) for m in (user(f"Say {n}."), reply(f"{n}, said.\n"))),
    ],
}

MORE_WITH_TOOLS: dict[str, list[dict[str, Any]]] = {
    "a call and content of null": [user("Weather?"), {"role": "assistant", "tool_calls": [call(**ID)]}],
    "a thought that quotes the arguments": [
        user("Concerts?"),
        calls(
            call("search", {"q": "concerts"}, **ID),
            reasoning_content="I call search with {'q': 'concerts'} now.",
        ),
        result(**OF_ID),
        reply("None."),
    ],
    "ids that name the function": [
        user("Weather?"),
        calls(call(id="functions.weather:0")),
        result(tool_call_id="functions.weather:0", name="weather"),
        reply("Clear."),
    ],
}

MATRIX: dict[str, dict[str, Any]] = {
    **ALL,
    **{name: {"messages": m} for name, m in MORE_PLAIN.items()},
    **{name: {"messages": m, "tools": TOOLS} for name, m in MORE_WITH_TOOLS.items()},
    "thinking switched off": {
        "messages": [user(), reply()],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "thinking switched off, tags in the content": {
        "messages": [user(), reply("<think>\nhm\n</think>\n\nyo")],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "thinking switched on, a thought": {
        "messages": [user(), reply(**THOUGHT)],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    "thinking switched on, none there": {
        "messages": [user(), reply()],
        "chat_template_kwargs": {"enable_thinking": True},
    },
}
