"""trl's SFTTrainer on given prompts and completions, loss on completions alone.

job: model, batches (lists of {prompt, completion}), lr, dtype, out, peer, threads"""
from timed import arguments, job, timed
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils

values = job()
if values["peer"] == "tuned":
    # trl 1.16 projects completion tokens alone only where it finds Triton, else every position. It asks this function; its tiles stay in torch.
    utils._use_triton = lambda device: True
tokenizer = AutoTokenizer.from_pretrained(values["model"])
tokenizer.pad_token = tokenizer.eos_token                # harmless here: labels are masked by column, not by token
model = AutoModelForCausalLM.from_pretrained(values["model"], dtype="float32")     # its config.json has dropout 0
timed(SFTTrainer, values["batches"], model=model, args=SFTConfig(completion_only_loss=True, **arguments(values)), processing_class=tokenizer)
