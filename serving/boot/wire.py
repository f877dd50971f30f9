"""The last step of the start: an engine around what was compiled, and one request before the first."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from models.loading.gguf.file import split_paths
from models.loading.load import LoadedModel
from serving.boot.check import Checked
from serving.boot.compile import CompiledDecoder, CompiledEncoder
from serving.boot.draft_source import draft_source
from serving.boot.load import reader
from serving.engine.device.followers import Followers
from serving.engine.encoder.engine import EncoderEngine
from serving.engine.engine import Engine
from serving.engine.rehearsal import rehearse
from serving.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from serving.kv_events.config import KVEventsConfig
from serving.kv_events.start import KVEvents
from serving.transfer.config import PEER_KEY_VARIABLE, TransferConfig

REHEARSAL_S = 600.0
"""How long a request of two tokens may take on the slowest device before the start counts as failed."""


def wire_decoder(
    checked: Checked, loaded: LoadedModel, compiled: CompiledDecoder, followers: Followers | None = None
) -> Engine:
    """A running engine that has answered one request.

    Args:
        followers: the engine's other processes, which are sent every command from now on.
    """
    scheduler = Scheduler(compiled.scheduler)
    engine = Engine(checked.config, loaded, compiled.runner, scheduler, compiled.info, load_model=reader(checked))
    told = KVEventsConfig.of(checked.config.kv_events_config)
    events = KVEvents(told, compiled.scheduler.replicas) if told.enable_kv_cache_events else None
    if events is not None:
        scheduler.kv.tell(events.log.add)
        engine.tell_pages(events.log, events.close)
        events.start()
    exchange(checked, loaded, engine)
    if followers is not None:
        engine.runner.executor.lead(followers)
    engine.loop.start()
    try:
        engine.call(lambda: rehearse(engine.scheduler, engine.runner), timeout=REHEARSAL_S)
    except BaseException:
        engine.shutdown()
        raise
    return engine


def exchange(checked: Checked, loaded: LoadedModel, engine: Engine) -> None:
    """Has the engine exchange pages with others, where it is asked to."""
    told = TransferConfig.of(checked.config.role, checked.config.kv_transfer_config)
    folder = checked.config.kv_disk
    if not told.role and folder is None:
        return
    from serving.transfer.exchange import exchange_pages
    from serving.transfer.grpc_transport import GrpcTransport

    weights, facts = what_pages_are(checked, engine.scheduler.config)
    transport = GrpcTransport(os.environ.get(PEER_KEY_VARIABLE), told.client_tls) if told.takes else None
    disk = None if folder is None else (pathlib.Path(folder).expanduser(), checked.config.kv_disk_size)
    exchange_pages(engine, told, weights, facts, transport, disk)


def what_pages_are(checked: Checked, config: SchedulerConfig) -> tuple[bytes, tuple[Any, ...]]:
    """What decides the content of an engine's pages, a draft's part of them included: a digest of the files of weights, and the
    facts that `transfer.identity.identity_of` takes."""
    from serving.transfer.identity import weights_digest

    sources = [checked.opened.source, None if checked.draft is None else draft_source(checked.config)]
    paths = [source.path for source in sources if source is not None]
    files = [file for path in paths for file in (split_paths(path) if path.is_file() else [path])]
    facts = (checked.built.config, checked.dtype, checked.quantization, config.page_size, config.windows)
    if checked.draft is not None:  # whose pages travel with the model's
        facts = (*facts, checked.draft.facts)
    return b"".join(map(weights_digest, files)), facts


def wire_encoder(checked: Checked, loaded: LoadedModel, compiled: CompiledEncoder) -> EncoderEngine:
    """A running encoder that has read one text."""
    engine = EncoderEngine(checked.config, loaded, compiled.runner, compiled.info, reader(checked), compiled.labels)
    engine.start()
    return engine
