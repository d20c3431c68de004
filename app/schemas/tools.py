"""Tools in the body of `/v1/chat/completions`: which functions there are, and whether one must be called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.errors import BadField
from app.inference.protocol import ToolUse

MAX_TOOLS = 128
MAX_TOOLS_LENGTH = 262_144
"""Characters of all tools of a request, as JSON."""
FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(BaseModel):
    """A function that a model may call. With `strict`, and where a call is required, the arguments follow the schema of the parameters."""

    model_config = ConfigDict(extra="forbid")

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: FunctionName


class NamedTool(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(BaseModel):
    model_config = ConfigDict(extra="forbid")

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class ToolChoice(BaseModel):
    """The one function that must be called, or those that may be."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


Choice = Literal["none", "auto", "required"] | ToolChoice


class ToolOrder(BaseModel):
    """The tools that the model is told of, in the form that chat templates take, and their use."""

    tools: list[dict[str, Any]] | None
    use: ToolUse


def order_of(tools: Sequence[FunctionTool] | None, choice: Choice | None, parallel: bool | None) -> ToolOrder:
    """What a request asks for. Raises BadField for a choice of a function that is not there, and for tools that are too large."""
    tools = tools or []
    names = [tool.function.name for tool in tools]
    if len(set(names)) != len(names):
        raise BadField("Two tools have the same name.", hint="Give each a name of its own.", param="tools")
    if len(json.dumps([tool.model_dump(mode="json") for tool in tools])) > MAX_TOOLS_LENGTH:
        raise BadField("The tools are too large.", hint=f"Send at most {MAX_TOOLS_LENGTH:,} characters of them.", param="tools")
    for place, tool in enumerate(tools):
        if (tool.function.parameters or {}).get("type", "object") != "object":
            path = f"tools.{place}.function.parameters"
            raise BadField(f"{path} is no schema of an object.", hint='Its type is "object"; the arguments are its properties.', param=path)
    calls, allowed, named = _chosen(choice)
    for name in [*allowed, *([named] if named else [])]:
        if name not in names:
            raise BadField(f"There is no tool {name!r}.", hint="Name one of the tools of the request.", param="tool_choice")
    if calls == "required" and not tools:
        raise BadField("tool_choice asks for a call, and there are no tools.", hint="Send tools with it.", param="tool_choice")
    kept = [tool for tool in tools if calls != "none" and (not allowed or tool.function.name in allowed)]
    strict = tuple(tool.function.name for tool in kept if tool.function.strict)
    use = ToolUse(calls="required" if calls == "required" else "auto", function=named, strict=strict, parallel=parallel is not False)
    return ToolOrder(tools=[_for_template(tool) for tool in kept] or None, use=use)


def _chosen(choice: Choice | None) -> tuple[Literal["none", "auto", "required"], list[str], str | None]:
    """Whether a call may or must come, the functions that are allowed (all where empty), and the only one that may be called."""
    if not isinstance(choice, ToolChoice):
        return choice or "auto", [], None
    if choice.type == "function" and choice.function is not None and choice.allowed_tools is None:
        return "required", [], choice.function.name
    if choice.type == "allowed_tools" and choice.allowed_tools is not None and choice.function is None:
        return choice.allowed_tools.mode, [tool.function.name for tool in choice.allowed_tools.tools], None
    raise BadField(
        "tool_choice does not hold what its type names.",
        hint='Send {"type": "function", "function": {"name": …}} or {"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}.',
        param="tool_choice",
    )


def _for_template(tool: FunctionTool) -> dict[str, Any]:
    """The tool as rows of training data have it: without `strict`, which is said to the studio and not to the model."""
    function = tool.function.model_dump(mode="json", exclude_none=True, exclude={"strict"})
    return {"type": "function", "function": function}
