"""Eval generation: a file of prompts and how to read it -> the task of answering them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.cli import options
from headwise.cli.eval_options import WORKLOAD

File = Annotated[
    Path,
    typer.Option(
        "--file",
        "-f",
        metavar="PATH",
        help="JSON lines or a JSON list, perhaps gzipped: GSM8K's, HumanEval's, AlpacaEval's, or any other.",
        rich_help_panel=options.INPUT,
    ),
]
PromptField = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Field of the prompt, in other files.", rich_help_panel=options.INPUT),
]
AnswerField = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Field of the answer, in other files.", rich_help_panel=options.INPUT),
]
Prefix = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text to put before every prompt, such as worked examples.",
        rich_help_panel=options.INPUT,
    ),
]
Template = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="chat: in the tokenizer's chat template; raw: as it is; auto: what suits the file.",
        rich_help_panel=options.INPUT,
    ),
]
Metric = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="number: the last number is right; rouge: ROUGE-L to the answer; code: the file's tests pass; none; "
        "or auto: what suits the file.",
        rich_help_panel=WORKLOAD,
    ),
]
RunCode = Annotated[
    bool,
    typer.Option(
        "--run-code",
        help="Run programs that the model wrote, with limits on time and memory. They can do all that you can: "
        "this is no sandbox.",
        rich_help_panel=WORKLOAD,
    ),
]
Items = Annotated[
    int | None, typer.Option(metavar="N", help="Prompts at the most; all of them.", rich_help_panel=WORKLOAD)
]
MaxPromptTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Leave out longer prompts.", rich_help_panel=WORKLOAD)
]
NewTokens = Annotated[int, typer.Option(metavar="N", help="Length of an answer at the most.", rich_help_panel=WORKLOAD)]


def generation(
    file: File,
    prompt_field: PromptField = None,
    answer_field: AnswerField = None,
    prefix: Prefix = None,
    template: Template = "auto",
    metric: Metric = "auto",
    run_code: RunCode = False,
    items: Items = None,
    max_prompt_tokens: MaxPromptTokens = None,
    new_tokens: NewTokens = 128,
) -> list[Any]:
    """Answer the prompts of a file: is it what the full cache answers, and is it right?"""
    from headwise.eval.generation import Generation

    return [
        Generation(
            file=file,
            prompt_field=prompt_field,
            answer_field=answer_field,
            prefix=prefix,
            template=template,
            metric=metric,
            run_code=run_code,
            limit=items,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=new_tokens,
        )
    ]
