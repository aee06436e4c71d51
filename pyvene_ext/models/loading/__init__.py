"""Models and tokenizers by name, from what people have.

    model, tokenizer = load_model("tiny-qwen2.5")               # a shipped model
    model, tokenizer = load_model("Qwen/Qwen2.5-3B")            # a repository on the hub, or a folder
    model, tokenizer = load_model("model.Q4_K_M.gguf")          # a GGUF file, a folder with one, or hub-id:file.gguf
    model, tokenizer = load_model("smollm2-135m-instruct")      # after `python -m pyvene_ext.models fetch smollm2-135m-instruct`

`sources` finds out what a name means, `fetch` and `gguf` make a folder of safetensors of what is none, and `load` reads a folder
or repository, with `checks` of what it holds and one sentence for everything that can go wrong (`errors`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
