"""Causal language models that transformers has only inside of vision-language ones, so that their text models are read
and run by the same calls as all others."""

from torch import nn
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3VLMoeTextConfig, Qwen3VLTextConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel


class Qwen3VLForCausalLM(Qwen3ForCausalLM):
    """The text model of Qwen3-VL with its output head."""

    config: Qwen3VLTextConfig
    inner = Qwen3VLTextModel
    _no_split_modules = ("Qwen3VLTextDecoderLayer",)

    def __init__(self, config):
        Qwen3PreTrainedModel.__init__(self, config)
        self.model = self.inner(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class Qwen3VLMoeForCausalLM(Qwen3VLForCausalLM):
    """The same with experts."""

    config: Qwen3VLMoeTextConfig
    inner = Qwen3VLMoeTextModel
    _no_split_modules = ("Qwen3VLMoeTextDecoderLayer",)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for a decorator in the file of the class, and sets nothing where it has none


AutoModelForCausalLM.register(Qwen3VLTextConfig, Qwen3VLForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(Qwen3VLMoeTextConfig, Qwen3VLMoeForCausalLM, exist_ok=True)


class _TransposedOnDisk(Transpose):
    """As transformers has it for these experts, but also when they are saved: it would leave them as they are, for
    their shapes are those that they had in the model."""

    @property
    def reverse_op(self) -> Transpose:
        return Transpose(self.dim1, self.dim0)


register_checkpoint_conversion_mapping(
    Qwen3VLMoeForCausalLM.__name__,
    [
        WeightConverter(name, name, operations=[_TransposedOnDisk(1, 2, check_dims=True)])
        for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    ],
)
