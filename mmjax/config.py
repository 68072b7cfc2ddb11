"""Everything a run can be told, as frozen dataclasses."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How samples become rows of tokens.

    prompt_template: wraps every prompt and every question of a conversation at its `{}`; "" leaves them as they are.
                     MiniGPT-4 on Vicuna: "###Human: {} ###Assistant: ", on LLaMA-2: "[INST] {} [/INST] ",
                     MiniGPT-v2: "[INST] {} [/INST]" (the final space matters to the tokens)
    end_sym:         ends every answer
    max_txt_len:     tokens kept of an answer, or of everything behind the first question of a conversation
    max_context_len: tokens kept of a prompt with pictures (soft tokens counted); the right end is cut
    """

    prompt_template: str = ""
    end_sym: str = "###"
    max_txt_len: int = 160
    max_context_len: int = 3800
