"""Where the blocking work of the text side runs: off the event loop, each request's faults its own."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from serving.errors import ErrorKind, RequestError, invalid

log = logging.getLogger(__name__)


class TextThreads:
    """Threads that tokenize, render and compile grammars.

    Args:
        executor: for all but grammars; None makes two threads.
        grammar_timeout_s: seconds that a grammar may take to compile.
    """

    def __init__(self, executor: Executor | None, grammar_timeout_s: float) -> None:
        self._executor = executor or ThreadPoolExecutor(2, thread_name_prefix="jaxserve-text")
        # Apart: a thread cannot be interrupted, so a grammar that runs into its time limit goes on occupying one.
        self._grammar_executor = ThreadPoolExecutor(2, thread_name_prefix="jaxserve-grammar")
        self._grammar_timeout_s = grammar_timeout_s

    async def run(self, function: Any, *args: Any) -> Any:
        """Runs a function of the text side in a thread. Its ValueErrors are sentences about the request; whatever else it
        raises is this request's too, panics of the tokenizer's Rust, which are no `Exception`, included."""
        return await self._run(self._executor, function, *args)

    async def compile(self, compiler: Any, grammar: Any, subject: str, param: str) -> Any:
        """What a compiler makes of a grammar, within the time limit.

        Raises:
            RequestError: INVALID_ARGUMENT about `param`.
        """
        try:
            async with asyncio.timeout(self._grammar_timeout_s):
                return await self._run(self._grammar_executor, compiler, grammar)
        except TimeoutError:
            limit = self._grammar_timeout_s
            raise invalid(f"{subject} more than {limit:g} seconds to compile. Simplify.", param) from None

    async def _run(self, executor: Executor, function: Any, *args: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, function, *args)
        except ValueError as error:
            raise invalid(str(error)) from error
        except (RequestError, asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            log.error("the text side failed on a request", exc_info=error)
            raise RequestError(
                ErrorKind.INTERNAL, "The server failed to read this request; its log says why."
            ) from error
