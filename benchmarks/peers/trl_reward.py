"""trl's RewardTrainer on given pairs.  job: model, batches (lists of {prompt, chosen, rejected}), lr, dtype, out, peer, threads"""
from timed import arguments, job, timed
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

values = job()
tokenizer = AutoTokenizer.from_pretrained(values["model"])
# Without a token of its own for padding the trainer takes EOS, and the model then reads the reward one token early, before EOS.
tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
model = AutoModelForSequenceClassification.from_pretrained(values["model"], dtype="float32")       # its config.json has dropout 0
assert len(tokenizer) == model.config.vocab_size, (len(tokenizer), model.config.vocab_size)
timed(RewardTrainer, values["batches"], model=model, args=RewardConfig(**arguments(values)), processing_class=tokenizer)
