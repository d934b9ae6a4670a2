"""Nemotron-H with experts: routed and shared ones without a gate, beside layers of Mamba and of attention, top-k free
at serve time, for Nemotron-H without experts."""

from typing import ClassVar

import gguf
import torch
from torch import Tensor
from transformers import NemotronHConfig, PreTrainedConfig

from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import carried
from factorllm.hosts.gates import SIGMOID
from factorllm.hosts.mamba import mamba_content, mamba_names
from factorllm.hosts.reasons import unmixed
from factorllm.hosts.stored import Stored, one_expert, per_expert
from factorllm.recipe import Shape

_USUAL_STEP = 0.001


class NemotronHHost(MoeHost):
    name = "nemotron_h"
    families = ("nemotron_h",)
    shared = "always"
    activation = "relu2"
    gates = SIGMOID
    # vLLM on GPUs only. SGLang knows other names of the kinds of layers than transformers writes.
    all_engines = ("transformers", "vllm", "llama.cpp")
    ties_embeddings = False
    gguf_architecture = "nemotron_h_moe"
    gguf_final_norm = ("norm_f", "output_norm")
    gguf_names: ClassVar = {
        "norm": "attn_norm",
        "mixer.q_proj": "attn_q",
        "mixer.k_proj": "attn_k",
        "mixer.v_proj": "attn_v",
        "mixer.o_proj": "attn_output",
        **mamba_names("mixer"),
    }
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("mixer.gate.weight"),
        "exp_probs_b.bias": Stored("mixer.gate.e_score_correction_bias"),
        "ffn_up_exps.weight": Stored("mixer.experts.{}.up_proj.weight"),
        "ffn_down_exps.weight": Stored("mixer.experts.{}.down_proj.weight"),
        "ffn_up_shexp.weight": Stored("mixer.shared_experts.up_proj.weight"),
        "ffn_down_shexp.weight": Stored("mixer.shared_experts.down_proj.weight"),
    }

    def ffn_parts(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("mixer",)

    def matrices(self, config: PreTrainedConfig) -> int:
        return 2

    def _reason_against_shape(self, shape: Shape) -> str | None:
        if shape.experts < 2:
            return "its router needs two routed experts at least"  # whatever its top-k
        return super()._reason_against_shape(shape)

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        changed = {
            "tie_word_embeddings": False,
            "layers_block_type": ["moe" if kind == "mlp" else kind for kind in dense.layers_block_type],
            "n_routed_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "moe_intermediate_size": shape.expert_width,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": shape.shared_width,
            "moe_latent_size": None,
            "num_nextn_predict_layers": 0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.0,  # gate weights are 2 x sigmoid(logit): 1 for flat routers
        }
        return NemotronHConfig(**carried(dense, NemotronHConfig) | changed, architectures=["NemotronHForCausalLM"])

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return {
            "mixer.gate.weight": student.router,
            "mixer.gate.e_score_correction_bias": torch.zeros_like(student.router[:, 0]),
            **per_expert(student.experts(self.gates), "mixer.experts"),
            **one_expert(student.shared(), "mixer.shared_experts"),
        }

    def gguf_misfit(self, config: PreTrainedConfig) -> str | None:
        if config.use_bias:
            return "the projections of Mamba have no biases"
        if not config.use_conv_bias:
            return "the convolutions of Mamba have biases"
        # As its makers have it, and vLLM. transformers bounds them at the usual value, where it hardly matters.
        if config.time_step_min > _USUAL_STEP:
            return f"Mamba's time steps have no lower bound, such as time_step_min = {config.time_step_min}"
        if config.mamba_hidden_act != "silu":
            return "the convolutions of Mamba are followed by silu"
        return unmixed(config.layers_block_type)

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.moe_intermediate_size,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_shared_count": config.n_shared_experts,
            "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
            "expert_weights_norm": False,
            "expert_weights_scale": config.routed_scaling_factor,
        }

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        heads, eps = config.num_key_value_heads, config.layer_norm_epsilon
        return {
            "attention.layer_norm_epsilon": eps,
            "attention.layer_norm_rms_epsilon": eps,
            # A layer without heads is an FFN where it has a width of one, else Mamba.
            "attention.head_count_kv": [heads if kind == "full_attention" else 0 for kind in config.layers_block_type],
            "ssm.conv_kernel": config.conv_kernel,
            "ssm.state_size": config.ssm_state_size,
            "ssm.group_count": config.n_groups,
            "ssm.time_step_rank": config.mamba_num_heads,
            "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
        }

    def gguf_content(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        return mamba_content(name, tensor, config.n_groups)
