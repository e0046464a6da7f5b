"""Eval generation: a file of prompts and how to read it -> the task of answering them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.cli import options

_WORKLOAD = "Workload"


def generation(
    file: Annotated[
        Path,
        typer.Option(
            "--file",
            "-f",
            metavar="PATH",
            help="JSON lines or a JSON list, perhaps gzipped: GSM8K's, HumanEval's, AlpacaEval's, or any other.",
            rich_help_panel=options.INPUT,
        ),
    ],
    prompt_field: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Field of the prompt, in other files.", rich_help_panel=options.INPUT),
    ] = None,
    answer_field: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Field of the answer, in other files.", rich_help_panel=options.INPUT),
    ] = None,
    prefix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to put before every prompt, such as worked examples.",
            rich_help_panel=options.INPUT,
        ),
    ] = None,
    template: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="chat: in the tokenizer's chat template; raw: as it is; auto: what suits the file.",
            rich_help_panel=options.INPUT,
        ),
    ] = "auto",
    metric: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="number: the last number is right; rouge: ROUGE-L to the answer; code: the file's tests pass; none; "
            "or auto: what suits the file.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = "auto",
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Run programs that the model wrote, with limits on time and memory. They can do all that you can: "
            "this is no sandbox.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = False,
    items: Annotated[
        int | None, typer.Option(metavar="N", help="Prompts at the most; all of them.", rich_help_panel=_WORKLOAD)
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Leave out longer prompts.", rich_help_panel=_WORKLOAD)
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Length of an answer at the most.", rich_help_panel=_WORKLOAD)
    ] = 128,
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
