"""Commands in several processes that share each weight, without GPUs: accelerate shards over GPUs only, though torch's
FSDP2 can do so over processes that talk through gloo too."""

from accelerate import DistributedType, PartialState

_init = PartialState.__init__


def _as_gpus(state: PartialState, *arguments, **options) -> None:
    _init(state, *arguments, **options)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = _as_gpus
