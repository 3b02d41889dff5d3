"""Text to token ids and back: sentencepiece (LLaMA), GPT-2's files, byte-level tokenizer.json (SmolLM2, Llama 3), and two small trainers.

Every tokenizer here has `eos_id`, `bos_id` (None: no BOS is put first), `pad_id` (never EOS: transformers reads a reward at the last
token that is not padding), `vocab_size`, and `encode`, `encode_prompt`, `decode`, `save`.

The whitespace rule, one for both families: a prompt and its response are encoded apart, and text is kept exactly as it is.
`encode_prompt` starts a sequence (BOS where the model has one; LLaMA's dummy prefix space), `encode` continues one and adds nothing.
So a response's leading space is part of the response: " What" is GPT-2's one token " What" and sentencepiece's one piece "▁What".
Special tokens spelled in a text are plain text; no text can end a response by writing "</s>".
"""
import io
import json
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import regex  # tiktoken depends on it; `re` knows no \p{L}
import sentencepiece
import tiktoken

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|eot_id|>")
# Copied by save(). A tokenizer.json beside tokenizer.model is for transformers, whose own conversion of the model gets double spaces wrong.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
MAX_TOKENIZER_BYTES = 2**27                           # bytes: a tokenizer.json of 256 thousand tokens has 33 million
SPARSEST = 4                                   # ids a token, for vocab_size is the embedding's: real ones have no gaps, or few
MOST_MERGING = 2**26                           # squared lengths of all tokens, what merging them takes; Llama 3's have 9 million
LONGEST_PATTERN, MOST_STEPS = 1000, 16         # of a pre_tokenizer: Llama 3's has 130 characters and two steps
REGEX_TIMEOUT = 1.0                                 # seconds for a pattern on 1,000 equal letters: Llama 3's needs 0.01 on spaces, a*a*a*a*b for ever
# GPT-2 writes each byte as one printable character: itself, or, for space, control and a few more, one from 256 on ("Ġ" is a space).
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in _printable} | {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(_printable)))}
CHAR_OF = {b: c for c, b in BYTE_OF.items()}


class Saved:
    def save(self, folder):
        """Writes the files that load() reads back: the original bytes wherever there was an original."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, raw in self.files.items():
            (Path(folder) / name).write_bytes(raw)


class SentencePiece(Saved):
    def __init__(self, files, where):
        self.files, raw = files, files["tokenizer.model"]
        try:
            # A protobuf followed by another merges with it. These bytes say normalizer_spec { add_dummy_prefix: false,
            # remove_extra_whitespaces: false }, so that encode() neither puts a space before every text nor loses one;
            # encode_prompt() puts it there itself. save() writes the original.
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=raw + b"\x1a\x04\x18\x00\x20\x00")
        except RuntimeError as error:
            raise ValueError(f"{where}: not a sentencepiece model ({error}); download it again") from error
        sp = self._sp
        self.vocab_size, self.eos_id = sp.vocab_size(), sp.eos_id()
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.pad_id = sp.pad_id() if sp.pad_id() not in (-1, self.eos_id) else sp.unk_id()
        if self.eos_id < 0:
            raise ValueError(f"{where}: the model has no end-of-sentence piece; train it with eos_id 2")
        self._underscore = [sp.piece_to_id(f"<0x{b:02X}>") for b in "▁".encode()]
        probe = " a  b\n\tÀé\u0301ﬁ①😀▁ "
        if (back := self.decode(self.encode(probe))) != probe:
            raise ValueError(f"{where}: the model changes text ({probe!r} came back as {back!r}); it needs byte_fallback and identity normalisation")

    def encode(self, text):
        """Exactly this text, as the continuation of another. The character "▁" is sentencepiece's space, so it is spelled in bytes."""
        first, *rest = map(self._sp.encode, _valid(text).split("▁"))
        return first + [i for part in rest for i in (*self._underscore, *part)]

    def encode_prompt(self, text):
        """The start of a sequence, as Hugging Face's LLaMA tokenizer encodes it: BOS and a dummy space before the first word."""
        ids = self.encode(" " + text) if text else []
        return ([] if self.bos_id is None else [self.bos_id]) + ids or [self.eos_id]

    def decode(self, ids):
        """Inverse of encode; control pieces, unknown and padding ids are left out; bytes that are not UTF-8 become U+FFFD."""
        sp = self._sp
        return sp.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and not (sp.is_control(i) or sp.is_unknown(i))])


class ByteLevelBPE(Saved):
    """Byte-level BPE: `splits`, one after another, cut a text into pieces; each piece is merged by itself, lowest rank first.

    vocab {token: id} and merges [(left, right)] in GPT-2's alphabet;  special {token: id}, never made from text;  whole: a piece
    that is itself a token is not merged at all (Llama 3's ignore_merges).

    tiktoken does the merging. It joins any two parts whose *bytes* make a token, in the order of the tokens; the file joins the listed
    pairs in the order of the list. The two agree if each token is known to tiktoken only when its own characters merge into it, and
    ranked by the merge that ends this: inside a longer piece, what lies between a token's two ends goes through the very same steps.
    """

    def __init__(self, vocab, merges, special, splits, whole, eos_id, bos_id, pad_id, files, where):
        self.eos_id, self.bos_id, self.pad_id, self.files = eos_id, bos_id, pad_id, files
        self.vocab_size = max([*vocab.values(), *special.values()]) + 1
        self._vocab, self._splits, self._ranks = vocab, splits, {pair: rank for rank, pair in enumerate(merges)}
        text_tokens = vocab.keys() - special.keys()
        for pair in merges:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= text_tokens:
                raise ValueError(f"{where}: the merge {pair!r:.80} does not join two tokens into a third; download the file again")
        plain = {token: vocab[token] for token in text_tokens if BYTE_OF.keys() >= set(token)}
        self._bytes_of = {i: bytes(BYTE_OF[c] for c in token) for token, i in plain.items()}
        self._whole = plain if whole else {}
        self._holes = {b for c, b in BYTE_OF.items() if c not in plain}        # SmolLM2's 21: no token, so they vanish from a text
        if sum(len(token) ** 2 for token in plain) > MOST_MERGING:
            raise ValueError(f"{where}: tokens too long to be merged one by one, the longest has {max(map(len, plain)):,} bytes; download it again")
        ends = ((token, *bpe(token, self._ranks)) for token in plain)
        made = sorted((rank, token) for token, parts, rank in ends if parts == [token])
        self._id_of_rank = [plain[token] for _, token in made]
        ranks = {self._bytes_of[i]: rank for rank, i in enumerate(self._id_of_rank)}
        self._tiktoken = tiktoken.Encoding("pieces", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={})
        self._piece_ids = lru_cache(maxsize=1 << 16)(self._merge)

    def _merge(self, piece):
        raw = piece.encode()
        word = "".join(CHAR_OF[b] for b in raw)
        if word in self._whole:
            return (self._whole[word],)
        if self._holes.isdisjoint(raw):
            return tuple(self._id_of_rank[rank] for rank in self._tiktoken.encode_ordinary(piece))
        parts, _ = bpe("".join(CHAR_OF[b] for b in raw if b not in self._holes), self._ranks)
        return tuple(self._vocab[part] for part in parts)

    def encode(self, text):
        """Exactly this text, as the continuation of another."""
        pieces = [_valid(text)]
        for split in self._splits:
            pieces = [part for piece in pieces for part in _isolate(split, piece)]
        return [i for piece in pieces for i in self._piece_ids(piece)]

    def encode_prompt(self, text):
        """The start of a sequence. With nothing to predict from, it is EOS: GPT-2 was trained with one between documents."""
        ids = self.encode(text)
        return ([] if self.bos_id is None else [self.bos_id]) + ids or [self.eos_id]

    def decode(self, ids):
        """Inverse of encode; special, unknown and padding ids are left out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._bytes_of.get(int(i), b"") for i in ids).decode("utf-8", "replace")


def bpe(word, ranks):
    """Byte-pair encoding itself: join the leftmost pair of the lowest rank until none is listed.  -> (parts, rank of the last join or -1)"""
    parts, last = list(word), -1
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:]))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        i, last = pairs.index(best), ranks[best]
        parts[i:i + 2] = ["".join(best)]
    return parts, last


def load(folder):
    """The tokenizer of a model folder. tokenizer.json comes before GPT-2's two files, which carry neither split rules nor special tokens."""
    folder = Path(folder)
    for names in (("tokenizer.model",), ("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if all((folder / name).is_file() for name in names):
            break
    else:
        raise FileNotFoundError(f"{folder}: no tokenizer; looked for tokenizer.model, tokenizer.json, vocab.json + merges.txt, "
                                "encoder.json + vocab.bpe; copy one of them there")
    canonical = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
    files = {canonical.get(name, name): _read(folder / name) for name in (*names, *COMPANIONS) if (folder / name).is_file()}
    config = {}                                  # eos_token_id from the model's config.json, eos_token from tokenizer_config.json
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        config |= _json(_read(path), path) if path.is_file() else {}
    build = {"tokenizer.model": _from_sentencepiece, "tokenizer.json": _from_tokenizer_json}.get(names[0], _from_gpt2)
    try:
        return build(files, config, folder)
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeError, RecursionError) as error:      # a JSON value of the wrong type, mostly
        raise ValueError(f"{folder}: a tokenizer file has not the expected layout ({error!r:.150}); download it again") from error


def _from_sentencepiece(files, config, folder):
    defaults = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return SentencePiece({"tokenizer_config.json": _dump(defaults)} | files, folder / "tokenizer.model")


def _from_gpt2(files, config, folder):
    """GPT-2's two files: a tokenizer.json whose rules are left unsaid."""
    lines = files["merges.txt"].decode().replace("\r", "").split("\n")
    merges = [line for line in lines[lines[0].startswith("#version"):] if line]           # only there: "# #" is a merge of GPT-2's
    model = {"vocab": _json(files["vocab.json"], folder / "vocab.json"), "merges": merges}
    table = {"model": model, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    return _byte_level(table, files, {"tokenizer_class": "GPT2Tokenizer"}, config, folder)


def _from_tokenizer_json(files, config, folder):
    where = folder / "tokenizer.json"
    return _byte_level(_json(files["tokenizer.json"], where), files, {"tokenizer_class": "PreTrainedTokenizerFast"}, config, where)


def _byte_level(table, files, defaults, config, where):
    """Byte-level BPE in tokenizer.json's layout; whatever would not be followed to the letter is refused by name."""
    def refuse(what):
        raise ValueError(f"{where}: {what} is not supported here, ids would differ; use a GPT-2, SmolLM2 or Llama 3 tokenizer")

    model, normalizer, added = table["model"], table.get("normalizer"), table.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE":
        refuse(f"model type {model['type']!r:.40}")
    if normalizer and normalizer.get("normalizers") != []:
        refuse(f"normalizer {normalizer.get('type')!r:.40}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse(f"{key} {model[key]!r:.40}")
    vocab = _checked_vocab(model["vocab"], where)
    if not vocab.keys() >= BYTE_OF.keys() and (model.get("unk_token") is not None or model.get("byte_fallback")):
        refuse(f"a vocabulary without all 256 bytes, with unk_token {model.get('unk_token')!r:.40} or byte_fallback")
    if plain := next((token for token in added if not token.get("special")), None):
        refuse(f"the added token {plain['content']!r:.40}, found in plain text before anything is split,")
    special = _checked_vocab({token["content"]: token["id"] for token in added}, where) if added else {}
    ids = _checked_vocab(vocab | special, where)
    if max(ids.values()) > SPARSEST * len(ids):
        raise ValueError(f"{where}: the id {max(ids.values()):,} is far beyond its {len(ids):,} tokens; download it again")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    splits = _split_rules(table.get("pre_tokenizer") or {}, refuse)
    bos_id = _first_of_template(table.get("post_processor") or {}, refuse)
    if bos_id is not None and (type(bos_id) is not int or bos_id not in ids.values()):
        refuse(f"a post_processor that begins with an unknown id, {bos_id!r:.40},")
    eos_id, eos = _named_token("eos", ids, config, where, END_NAMES)
    never = {eos_id, bos_id, _named_token("bos", ids, config, where)[0]}
    spare = sorted(("pad" not in name.lower(), "reserved" not in name, i) for name, i in special.items() if i not in never)
    pad_id = spare[0][2] if spare else max(ids.values()) + 1                   # none to spare: one row more than the vocabulary
    if not config.get("eos_token"):                                            # a saved folder must name its EOS without config.json
        named = json.loads(files.get("tokenizer_config.json", b"{}"))
        files = files | {"tokenizer_config.json": _dump(defaults | named | {"eos_token": eos})}
    whole = bool(model.get("ignore_merges"))
    return ByteLevelBPE(vocab, merges, special | {eos: eos_id}, splits, whole, eos_id, bos_id, pad_id, files, where)


# What means the same to Oniguruma, which tokenizer.json is written for, and to `regex`: no nested sets, $, \h, possessive {n}+, (?i) ...
# Nor (a+)+, which takes for ever; a{1000000000} takes all memory.
_ESCAPE = r"\\(?:[pP]\{\w+\}|[sSdDrnt]|\W)"
_SAME_IN_BOTH = regex.compile(rf"(?:{_ESCAPE}|\[\^?(?:{_ESCAPE}|(?!&&)[^\\\[\]])+\]|\(\?(?:i:|[:=!>])|\((?!\?)|\)(?![*+{{])|\}}(?!\+)|[^\\\[\]()}}$^])*")


def _split_rules(rules, refuse):
    """tokenizer.json's pre_tokenizer as a list of compiled patterns, each to be isolated in the pieces of the one before."""
    steps = rules["pretokenizers"] if rules.get("type") == "Sequence" else [rules]
    if len(steps) > MOST_STEPS:
        refuse(f"a pre_tokenizer of {len(steps)} steps")
    if not steps or steps[-1].get("type") != "ByteLevel":
        refuse(f"a pre_tokenizer that ends with {steps[-1].get('type') if steps else None!r:.40}, not ByteLevel,")
    patterns = []
    for step in steps:
        pattern = step.get("pattern") or {}
        if step["type"] == "ByteLevel" and step is steps[-1] and step.get("add_prefix_space") is False:
            patterns += [GPT2_SPLIT] if step.get("use_regex", True) else []
        elif step["type"] == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            text = pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])
            if len(text) > LONGEST_PATTERN or not _SAME_IN_BOTH.fullmatch(text) or regex.search(r"\{[^}]*\d{4}", text):
                refuse(f"the split pattern {text!r:.60}")
            patterns.append(text)
        else:
            refuse(f"the pre_tokenizer step {json.dumps(step)[:120]}")
    try:
        compiled = [regex.compile(pattern) for pattern in patterns]
        for pattern in compiled:
            for letter in {*"a1 .", *pattern.pattern}:
                all(pattern.finditer(letter * 1000 + "\0" + pattern.pattern, timeout=REGEX_TIMEOUT))
    except (regex.error, TimeoutError) as error:
        refuse(f"a split pattern ({error})")
    return compiled


def _first_of_template(processor, refuse):
    """Id of the special token that post-processing puts first, or None."""
    for step in processor.get("processors") or [processor]:
        if step.get("type") == "TemplateProcessing" and step["single"] and "SpecialToken" in step["single"][0]:
            return step["special_tokens"][step["single"][0]["SpecialToken"]["id"]]["ids"][0]
        if step.get("type") not in (None, "ByteLevel", "TemplateProcessing"):
            refuse(f"the post_processor {step.get('type')!r:.40}")


def _named_token(kind, ids, config, where, known=()):
    """(id, text) of the folder's "eos" or "bos" token: as tokenizer_config.json names it, else config.json's id, else a known name."""
    named, number = config.get(f"{kind}_token"), config.get(f"{kind}_token_id")
    name, number = named["content"] if isinstance(named, dict) else named, number[0] if isinstance(number, list) and number else number
    if name is None and isinstance(number, int):
        name = next((token for token, i in ids.items() if i == number), f"id {number}")
    if name is None:
        name = next((token for token in known if token in ids), None)
    if name not in ids and kind == "eos":                      # a BOS is only kept apart from padding here: a stray id does no harm
        raise ValueError(f"{where}: no {kind} token ({name!r:.60} is not in the vocabulary); name it as \"{kind}_token\" in tokenizer_config.json")
    return ids.get(name), name


def _isolate(pattern, text):
    """The matches of a pattern and what lies between them, in order."""
    matches = [match[0] for match in pattern.finditer(text)]
    if sum(map(len, matches)) == len(text) and "" not in matches:                  # nothing lies between
        return matches
    cuts = sorted({0, len(text), *(at for match in pattern.finditer(text) for at in match.span())})
    return [text[start:end] for start, end in zip(cuts, cuts[1:])]


def train_bpe(texts, vocab_size):
    """A small byte-level BPE in GPT-2's format: 256 bytes, merges, <|endoftext|> last; fewer than asked where no pair is left twice."""
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is too small for byte-level BPE; use at least 257 (256 bytes and <|endoftext|>)")
    split = regex.compile(GPT2_SPLIT)
    counts = Counter(word for text in texts for word in split.findall(_valid(text)))
    words = [[CHAR_OF[b] for b in word.encode()] for word in counts]           # each distinct word once, with how often it occurs
    often, total, where = list(counts.values()), Counter(), defaultdict(set)
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            total[pair] += often[w]
            where[pair].add(w)
    merges = []
    while total and len(merges) < vocab_size - 257 and (most := max(total.values())) > 1:
        best = min(pair for pair, n in total.items() if n == most)             # ties: the first in the alphabet
        merges.append(best)
        change = Counter()
        for w in where.pop(best):                                              # only words that hold the pair change
            old, new = words[w], []
            for part in old:                                                   # left to right; a part just joined starts no other join
                joined = bool(new) and (new[-1], part) == best
                new[-1:] = [new[-1] + part] if joined else [*new[-1:], part]
            for pair in zip(old, old[1:]):
                change[pair] -= often[w]
            for pair in zip(new, new[1:]):
                change[pair] += often[w]
                where[pair].add(w)
            words[w] = new
        for pair, n in change.items():
            total[pair] += n
            if not total[pair]:
                del total[pair]
    tokens = [*BYTE_OF, *map("".join, merges), "<|endoftext|>"]
    files = {"vocab.json": _dump({token: i for i, token in enumerate(tokens)}),
             "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]).encode()}
    return _from_gpt2(files, {}, Path("trained BPE"))


def train_sentencepiece(texts, vocab_size):
    """A small LLaMA-like sentencepiece model: BPE with byte fallback, one token a digit, no normalisation; fewer pieces on little text."""
    lines, out = [line for text in texts for line in _valid(text).split("\n") if line], io.BytesIO()
    if not lines:
        raise ValueError("the texts to train sentencepiece on are empty; give it at least one line")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False,
            byte_fallback=True, split_digits=True, add_dummy_prefix=True, remove_extra_whitespaces=False,
            normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            max_sentence_length=1 << 20, num_threads=1, minloglevel=2)         # one thread: the same model every time
    except RuntimeError as error:
        raise ValueError(f"sentencepiece cannot make {vocab_size} pieces of these {len(lines)} lines ({error})") from error
    return _from_sentencepiece({"tokenizer.model": out.getvalue()}, {}, Path("trained sentencepiece"))


def _valid(text):
    """Half a surrogate pair, which JSON can spell but UTF-8 cannot, becomes U+FFFD; a whole one becomes its character."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read(path):
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{path}: more than {MAX_TOKENIZER_BYTES:,} bytes, no tokenizer file is so large; download it again")
    return path.read_bytes()


def _checked_vocab(vocab, where):
    ok = isinstance(vocab, dict) and vocab and all(isinstance(k, str) and type(i) is int and i >= 0 for k, i in vocab.items())
    if not ok or len(set(vocab.values())) != len(vocab):
        raise ValueError(f"{where}: a vocabulary maps each token to an id of its own, 0 or above; this one does not; download it again")
    return vocab


def _json(raw, where):
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); download it again") from error
    if not isinstance(table, dict):
        raise ValueError(f"{where}: a JSON object is expected, found {type(table).__name__}; download it again")
    return table


def _dump(table):
    return (json.dumps(table, ensure_ascii=False, indent=2) + "\n").encode()
