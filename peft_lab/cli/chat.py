"""Command `chat`: conversation with a causal language model and its adapter.

The model is loaded once its kind is checked, because that imports torch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from peft_lab.cli.completion import complete_task
from peft_lab.cli.options import Adapter, Base, OtherBase
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.utils.interruption import going_on
from peft_lab.utils.terminal import SafeConsole, shown

if TYPE_CHECKING:
    from peft_lab.serve.chat import Chat

#: Commands within a conversation.
_RESET, _EXIT = "/reset", "/exit"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(chat)


def chat(
    adapter: Adapter,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max_new_tokens", help="Tokens of an answer; the task's number, else 256.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Draw tokens; 0 takes the most likely one.")] = 0.0,
    top_p: Annotated[
        float | None, typer.Option("--top_p", help="Draw from this share of the probability; with --temperature.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    system: Annotated[str, typer.Option(help="System text, for models with a chat template.")] = "",
    prompt_value: Annotated[
        str | None, typer.Option("--prompt_value", help="Which prompts, for methods that choose them by row.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(autocompletion=complete_task, help="The task whose template applies, if the adapter names none."),
    ] = None,
    model_name_or_path: Base = None,
    allow_other_base: OtherBase = False,
) -> None:
    """Chat with a causal language model; without a terminal it answers standard input, one turn a line.

    /reset forgets the conversation, /exit ends it.
    """
    from peft_lab.loading.load_language_model import language_task
    from peft_lab.runs.run_folder import find_adapter
    from peft_lab.serve.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    folder = find_adapter(adapter)
    language_task(folder, adapter, task)
    from peft_lab.loading.load_language_model import load_language_model
    from peft_lab.serve.chat import Chat

    model = load_language_model(folder, task, model_name_or_path, allow_other_base=allow_other_base)
    conversation = Chat(model, system, sampling, prompt_value)
    with going_on(lambda: "The chat was stopped."):
        _converse(conversation, adapter)


def _converse(conversation: Chat, adapter: str) -> None:
    """Answer turn by turn until the input ends."""
    console = SafeConsole(stderr=True, highlight=False, soft_wrap=True)
    interactive = sys.stdin.isatty()
    if interactive:
        memory = "" if conversation.remembers else " Each turn is a prompt of its own."
        console.print(f"Chat with {shown(adapter)}.{memory} {_RESET} starts again, {_EXIT} ends.")
    for text in _turns(interactive):
        if text == _EXIT:
            return
        if text == _RESET:
            conversation.reset()
            if interactive:
                console.print("The conversation starts again.")
        elif text.startswith("/") and " " not in text:
            console.print(f"Unknown command {shown(text)}.{did_you_mean(text, (_RESET, _EXIT))}")
        else:
            # a turn that does not fit ends neither the conversation nor the lines after it
            try:
                conversation.say(text, _write)
            except ConfigError as error:
                console.print(f"[bold red]Error:[/] {shown(error)}")
            _write("\n")


def _turns(interactive: bool) -> Iterator[str]:
    """Turns that are not blank, from a prompt or from lines."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    # gives the prompt of `input` history and editing, where the system has it
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            _write("\n")
            return
        if text:
            yield text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
