"""Inspect asks a studio: one task of questions, one with a tool that is called."""

import json
import sys

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import Tool, ToolFunction, tool


@tool
def both() -> Tool:
    async def execute(x: bool, y: bool) -> bool:
        """Whether two things are both so.

        Args:
            x: The first.
            y: The second.
        """
        return x and y

    return execute


questions = [Sample(input="What wood is the belly made of?", target="spruce"), Sample(input="What is carved last?", target="The scroll")]
plain = Task(dataset=questions, solver=[generate()], scorer=includes())
calls = Task(
    dataset=questions[:1],
    solver=[use_tools(both(), tool_choice=ToolFunction(name="both")), generate(tool_calls="single")],
    scorer=includes(),
)
found = []
for task in (plain, calls):
    (log,) = eval(task, model="openai-api/studio/agent", max_tokens=400, temperature=0, seed=1, log_dir=sys.argv[1], display="none")
    usage = next(iter(log.stats.model_usage.values()), None)
    found.append(
        {
            "status": log.status,
            "error": log.error and log.error.message,
            "tokens": usage and usage.output_tokens,
            "samples": [
                {
                    "completion": one.output.completion,
                    "roles": [m.role for m in one.messages],
                    "stop": one.output.stop_reason,
                    "results": [str(m.content) for m in one.messages if m.role == "tool"],
                }
                for one in log.samples or []
            ],
        }
    )
print(json.dumps(found))
