"""Text to token ids and back: sentencepiece (LLaMA), GPT-2's files, byte-level tokenizer.json
(SmolLM2, Llama 3), and two small trainers.

Every tokenizer here has `vocab_size`, `eos_id`, `bos_id` (None: no BOS is put first), `pad_id`
(never EOS: transformers reads a reward at the last token that is not padding), and `encode`,
`encode_prompt`, `decode`, `save`.

The whitespace rule, one for both families: a prompt and its response are encoded apart, and text is
kept exactly as it is. `encode_prompt` starts a sequence (BOS where the model has one; LLaMA's dummy
prefix space), `encode` continues one and adds nothing. So a response's leading space is part of the
response: " What" is GPT-2's one token " What" and sentencepiece's one piece "▁What". Special
tokens spelled in a text are plain text; no text can end a response by writing "</s>".
"""
import io
import json
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import regex  # tiktoken depends on it; `re` knows no \p{L}
import sentencepiece
import tiktoken

from .read import MAX_JSON_BYTES, parse_json, read_bytes, read_json

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|eot_id|>")
# Copied by save(). A tokenizer.json beside tokenizer.model is for transformers, whose conversion of
# the model gets double spaces wrong.
EXTRA_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja"
)
MAX_IDS_PER_TOKEN = 4            # vocab_size is the embedding's: real ones have no gaps, or few
MAX_MERGE_COST = 2**26           # squared lengths of all tokens, summed; Llama 3's have 9 million
MAX_PATTERN_LENGTH = 1000        # of a split rule: Llama 3's has 130 characters
MAX_SPLIT_RULES = 16             # Llama 3 has two
# Seconds for a pattern on 1,000 equal letters: Llama 3's needs 0.01 on spaces, a*a*a*a*b for ever.
REGEX_TIMEOUT = 1.0
# GPT-2 writes each byte as one printable character: itself, or, for space, control characters and a
# few more, one from 256 on ("Ġ" is a space).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
CHAR_OF = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(_OTHERS)}
BYTE_OF = {c: b for b, c in CHAR_OF.items()}


class Tokenizer:
    """What both kinds share."""
    first_word_prefix = ""

    def encode_prompt(self, text):
        """The start of a sequence. With nothing to predict from it is EOS: GPT-2 was trained with
        one between documents.
        """
        ids = self.encode(self.first_word_prefix + text) if text else []
        bos = [] if self.bos_id is None else [self.bos_id]
        return bos + ids or [self.eos_id]

    def save(self, folder):
        """Writes the files that load() reads back: the original bytes where there were some."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, raw in self.files.items():
            Path(folder, name).write_bytes(raw)


class SentencePiece(Tokenizer):
    first_word_prefix = " "                      # as Hugging Face's LLaMA tokenizer has it

    def __init__(self, files, where):
        self.files = files
        # A protobuf followed by another merges with it. These bytes say normalizer_spec {
        # add_dummy_prefix: false, remove_extra_whitespaces: false }, so that encode() neither puts
        # a space before every text nor loses one; encode_prompt() adds it.
        # save() writes the original.
        raw = files["tokenizer.model"] + b"\x1a\x04\x18\x00\x20\x00"
        try:
            sp = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except RuntimeError as error:
            raise ValueError(
                f"{where}: not a sentencepiece model ({error}); download it again"
            ) from error
        self._sp = sp
        self.vocab_size = sp.vocab_size()
        self.eos_id = sp.eos_id()
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.pad_id = sp.unk_id() if sp.pad_id() in (-1, self.eos_id) else sp.pad_id()
        if self.eos_id < 0:
            raise ValueError(
                f"{where}: the model has no end-of-sentence piece; train it with eos_id 2"
            )
        self._underscore = sp.piece_to_id(["<0xE2>", "<0x96>", "<0x81>"])
        probe = " a  b\n\tÀé\u0301ﬁ①😀▁ "
        decoded = self.decode(self.encode(probe))
        if decoded != probe:
            raise ValueError(
                f"{where}: the model changes text ({probe!r} came back as {decoded!r}); "
                "it needs byte_fallback and identity normalisation"
            )

    def encode(self, text):
        """Exactly this text, as the continuation of another.

        The character "▁" is sentencepiece's space, so it is spelled in bytes.
        """
        first, *rest = map(self._sp.encode, _replace_surrogates(text).split("▁"))
        for ids in rest:
            first += self._underscore + ids
        return first

    def decode(self, ids):
        """Inverse of encode; control pieces, unknown and padding ids are left out; bytes that are
        not UTF-8 become U+FFFD.
        """
        sp = self._sp
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return sp.decode([i for i in known if not (sp.is_control(i) or sp.is_unknown(i))])


class ByteLevelBPE(Tokenizer):
    """Byte-level BPE: `splits`, one after another, cut a text into pieces; each piece is merged by
    itself, lowest rank first.

    vocab {token: id} and merges [(left, right)] in GPT-2's alphabet
    special {token: id}, never made from text
    ignore_merges: a piece that is itself a token is not merged at all (Llama 3)

    tiktoken does the merging. It joins any two parts whose *bytes* make a token, in the order of
    the tokens; the file joins the listed pairs in the order of the list. The two agree if each
    token is known to tiktoken only when its own characters merge into it, and ranked by the merge
    that ends this: inside a longer piece, what lies between a token's two ends goes through the
    same steps.
    """

    def __init__(
        self, vocab, merges, special, splits, ignore_merges, eos_id, bos_id, pad_id, files, where
    ):
        self.eos_id = eos_id
        self.bos_id = bos_id
        self.pad_id = pad_id
        self.files = files
        self.vocab_size = max([*vocab.values(), *special.values()]) + 1
        self._vocab = vocab
        self._splits = splits
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        text_tokens = vocab.keys() - special.keys()
        for pair in merges:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= text_tokens:
                raise ValueError(
                    f"{where}: the merge {pair!r:.80} does not join two tokens into a third; "
                    "download the file again"
                )
        plain = {token: vocab[token] for token in text_tokens if BYTE_OF.keys() >= set(token)}
        self._bytes_of = {i: bytes(BYTE_OF[c] for c in token) for token, i in plain.items()}
        self._unmerged = plain if ignore_merges else {}
        # bytes without a token, SmolLM2 has 21: they vanish from a text
        self._missing = BYTE_OF.keys() - plain
        if sum(len(token) ** 2 for token in plain) > MAX_MERGE_COST:
            raise ValueError(
                f"{where}: tokens too long to be merged one by one, the longest has "
                f"{max(map(len, plain)):,} bytes; download it again"
            )
        reachable = []                           # (rank of the merge that makes it, token)
        for token in plain:
            parts, rank = bpe(token, self._ranks)
            if parts == [token]:
                reachable.append((rank, token))
        self._id_of_rank = [plain[token] for _, token in sorted(reachable)]
        ranks = {self._bytes_of[i]: rank for rank, i in enumerate(self._id_of_rank)}
        self._tiktoken = tiktoken.Encoding(
            "pieces", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={}
        )
        self._piece_ids = lru_cache(maxsize=1 << 16)(self._merge)

    def _merge(self, piece):
        """Ids of a piece between two splits."""
        word = "".join(CHAR_OF[b] for b in piece.encode())
        if word in self._unmerged:
            return [self._unmerged[word]]
        if self._missing.isdisjoint(word):
            return [self._id_of_rank[rank] for rank in self._tiktoken.encode_ordinary(piece)]
        parts, _ = bpe([c for c in word if c not in self._missing], self._ranks)
        return [self._vocab[part] for part in parts]

    def encode(self, text):
        """Exactly this text, as the continuation of another."""
        pieces = [_replace_surrogates(text)]
        for split in self._splits:
            pieces = [part for piece in pieces for part in _split_isolated(split, piece)]
        return [i for piece in pieces for i in self._piece_ids(piece)]

    def decode(self, ids):
        """Inverse of encode; special, unknown and padding ids are left out; bytes that are not
        UTF-8 become U+FFFD.
        """
        raw = b"".join(self._bytes_of.get(int(i), b"") for i in ids)
        return raw.decode("utf-8", "replace")


def bpe(word, ranks):
    """Byte-pair encoding itself: join the leftmost pair of the lowest rank until none is listed.

    -> (parts, rank of the last join or -1)
    """
    parts = list(word)
    last = -1
    while joins := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        last, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts, last


# ------------------------------------------------------------------------------------- loading

def load(folder):
    """The tokenizer of a model folder.

    tokenizer.json comes before GPT-2's two files, which lack split rules and special tokens.
    """
    folder = Path(folder)
    builders = {
        ("tokenizer.model",): _from_sentencepiece,
        ("tokenizer.json",): _from_tokenizer_json,
        ("vocab.json", "merges.txt"): _from_gpt2,
        ("encoder.json", "vocab.bpe"): _from_gpt2
    }
    for names in builders:
        if all((folder / name).is_file() for name in names):
            break
    else:
        raise FileNotFoundError(
            f"{folder}: no tokenizer; looked for tokenizer.model, tokenizer.json, "
            "vocab.json + merges.txt, encoder.json + vocab.bpe; copy one of them there"
        )
    canonical = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
    files = {}
    for name in (*names, *EXTRA_FILES):
        if (folder / name).is_file():
            files[canonical.get(name, name)] = read_bytes(folder / name, MAX_JSON_BYTES)
    # eos_token_id is in the model's config.json, eos_token in tokenizer_config.json
    config = {}
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if path.is_file():
            config |= read_json(path)
    try:
        return builders[names](files, config, folder)
    # mostly a JSON value of the wrong type
    except (LookupError, TypeError, AttributeError, UnicodeError, RecursionError) as error:
        raise ValueError(
            f"{folder}: a tokenizer file has not the expected layout ({error!r:.150}); "
            "download it again"
        ) from error


def _from_sentencepiece(files, config, folder):
    defaults = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>"
    }
    files = {"tokenizer_config.json": _dump(defaults)} | files
    return SentencePiece(files, folder / "tokenizer.model")


def _from_gpt2(files, config, folder):
    """GPT-2's two files: a tokenizer.json whose rules are left unsaid."""
    merges = files["merges.txt"].decode().replace("\r", "").split("\n")
    if merges[0].startswith("#version"):         # only there: "# #" is a merge of GPT-2's
        del merges[0]
    vocab = parse_json(files["vocab.json"], folder / "vocab.json")
    table = {
        "model": {"vocab": vocab, "merges": [merge for merge in merges if merge]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}
    }
    return _byte_level(table, files, config, "GPT2Tokenizer", folder)


def _from_tokenizer_json(files, config, folder):
    path = folder / "tokenizer.json"
    table = parse_json(files["tokenizer.json"], path)
    return _byte_level(table, files, config, "PreTrainedTokenizerFast", path)


def _byte_level(table, files, config, tokenizer_class, where):
    """Byte-level BPE in tokenizer.json's layout; what is not implemented is refused by name."""
    def refuse(what):
        raise ValueError(
            f"{where}: {what} is not supported here, ids would differ; "
            "use a GPT-2, SmolLM2 or Llama 3 tokenizer"
        )

    model = table["model"]
    special = _special_tokens(table, refuse, where)
    vocab = model["vocab"]
    ids = _checked_vocab(vocab | special, where)
    max_id = max(ids.values())
    if max_id > MAX_IDS_PER_TOKEN * len(ids):
        raise ValueError(
            f"{where}: the id {max_id:,} is far beyond its {len(ids):,} tokens; download it again"
        )
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    splits = _split_rules(table.get("pre_tokenizer") or {}, refuse)
    bos_id = _first_of_template(table.get("post_processor") or {}, refuse)
    if bos_id is not None and (type(bos_id) is not int or bos_id not in ids.values()):
        refuse(f"a post_processor that begins with an unknown id, {bos_id!r:.40},")
    eos = _named_token("eos", ids, config)
    if eos is None:
        eos = next((token for token in END_NAMES if token in ids), None)
    if eos not in ids:
        raise ValueError(
            f"{where}: no eos token ({eos!r:.60} is not in the vocabulary); "
            "name it as \"eos_token\" in tokenizer_config.json"
        )
    eos_id = ids[eos]
    # a stray id of BOS does no harm: it is only kept apart from padding
    reserved_ids = {eos_id, bos_id, ids.get(_named_token("bos", ids, config))}
    free = []
    for name, i in special.items():
        if i not in reserved_ids:
            free.append(("pad" not in name.lower(), "reserved" not in name, i))
    # with no special token left, padding is one row more than the vocabulary
    pad_id = min(free)[2] if free else max_id + 1
    if not config.get("eos_token"):              # a saved folder names its EOS without config.json
        named = json.loads(files.get("tokenizer_config.json", b"{}"))
        files["tokenizer_config.json"] = _dump(
            {"tokenizer_class": tokenizer_class, **named, "eos_token": eos}
        )
    return ByteLevelBPE(
        vocab=vocab, merges=merges, special=special | {eos: eos_id},
        splits=splits, ignore_merges=model.get("ignore_merges"),
        eos_id=eos_id, bos_id=bos_id, pad_id=pad_id,
        files=files, where=where
    )


def _special_tokens(table, refuse, where):
    """Refuses what tokenizer.json asks for beyond plain byte-level BPE.  -> {special token: id}"""
    model = table["model"]
    normalizer = table.get("normalizer")
    if model.get("type", "BPE") != "BPE":
        refuse(f"model type {model['type']!r:.40}")
    if normalizer and normalizer.get("normalizers") != []:
        refuse(f"normalizer {normalizer.get('type')!r:.40}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse(f"{key} {model[key]!r:.40}")
    vocab = _checked_vocab(model["vocab"], where)
    unk = model.get("unk_token")
    if not vocab.keys() >= BYTE_OF.keys() and (unk is not None or model.get("byte_fallback")):
        refuse(f"a vocabulary without all 256 bytes, with unk_token {unk!r:.40} or byte_fallback")
    special = {}
    for token in table.get("added_tokens") or []:
        if not token.get("special"):
            refuse(
                f"the added token {token['content']!r:.40}, "
                "found in plain text before anything is split,"
            )
        special[token["content"]] = token["id"]
    return special


# What means the same to Oniguruma, which tokenizer.json is written for, and to `regex`: no nested
# sets, $, \h, possessive {n}+, (?i) ... Nor (a+)+, which takes for ever; a{1000000000} takes all
# memory.
_ESCAPE = r"\\(?:[pP]\{\w+\}|[sSdDrnt]|\W)"
_SET = rf"\[\^?(?:{_ESCAPE}|(?!&&)[^\\\[\]])+\]"
_GROUP = r"\(\?(?:i:|[:=!>])|\((?!\?)|\)(?![*+{])"
_SAME_IN_BOTH = regex.compile(rf"(?:{_ESCAPE}|{_SET}|{_GROUP}|\}}(?!\+)|[^\\\[\]()}}$^])*")


def _split_rules(rules, refuse):
    """tokenizer.json's pre_tokenizer as patterns, each isolated in the pieces of the one before."""
    steps = rules["pretokenizers"] if rules.get("type") == "Sequence" else [rules]
    if len(steps) > MAX_SPLIT_RULES:
        refuse(f"a pre_tokenizer of {len(steps)} steps")
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel":
        refuse(f"a pre_tokenizer that ends with {last.get('type')!r:.40}, not ByteLevel,")
    patterns = []
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and step is last and step.get("add_prefix_space") is False:
            if step.get("use_regex", True):
                patterns.append(GPT2_SPLIT)
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern") or {}
            text = pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])
            understood = len(text) <= MAX_PATTERN_LENGTH and _SAME_IN_BOTH.fullmatch(text)
            if not understood or regex.search(r"\{[^}]*\d{4}", text):
                refuse(f"the split pattern {text!r:.60}")
            patterns.append(text)
        else:
            refuse(f"the pre_tokenizer step {json.dumps(step)[:120]}")
    try:
        compiled = [regex.compile(pattern) for pattern in patterns]
        for pattern in compiled:
            for letter in {*"a1 .", *pattern.pattern}:
                text = letter * 1000 + "\0" + pattern.pattern
                list(pattern.finditer(text, timeout=REGEX_TIMEOUT))
    except (regex.error, TimeoutError) as error:
        refuse(f"a split pattern ({error})")
    return compiled


def _first_of_template(processor, refuse):
    """Id of the special token that post-processing puts first, or None."""
    for step in processor.get("processors") or [processor]:
        kind = step.get("type")
        if kind == "TemplateProcessing" and step["single"] and "SpecialToken" in step["single"][0]:
            name = step["single"][0]["SpecialToken"]["id"]
            return step["special_tokens"][name]["ids"][0]
        if kind not in (None, "ByteLevel", "TemplateProcessing"):
            refuse(f"the post_processor {kind!r:.40}")


def _named_token(kind, ids, config):
    """The "eos" or "bos" token: as tokenizer_config.json names it, else by config.json's id."""
    name = config.get(f"{kind}_token")
    number = config.get(f"{kind}_token_id")
    if isinstance(name, dict):
        name = name["content"]
    if isinstance(number, list) and number:
        number = number[0]
    if name is None and isinstance(number, int):
        name = next((token for token, i in ids.items() if i == number), f"id {number}")
    return name


def _split_isolated(pattern, text):
    """The matches of a pattern and what lies between them, in order."""
    cuts = [0]
    for match in pattern.finditer(text):
        cuts += match.span()
    cuts.append(len(text))
    return [text[start:end] for start, end in pairwise(cuts) if start < end]


# ------------------------------------------------------------------------------------ training

def train_bpe(texts, vocab_size):
    """A small byte-level BPE in GPT-2's format: 256 bytes, merges, <|endoftext|> last.

    It has fewer tokens than asked for where no pair is left twice.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size {vocab_size} is too small for byte-level BPE; "
            "use at least 257 (256 bytes and <|endoftext|>)"
        )
    split = regex.compile(GPT2_SPLIT)
    counts = Counter(word for text in texts for word in split.findall(_replace_surrogates(text)))
    parts_of = {word: [CHAR_OF[b] for b in word.encode()] for word in counts}
    pair_counts = Counter()
    words_with = defaultdict(set)                # pair -> words

    def count_pairs(word, n):
        for pair in pairwise(parts_of[word]):
            pair_counts[pair] += n
            words_with[pair].add(word)

    for word, n in counts.items():
        count_pairs(word, n)
    merges = []
    while len(merges) < vocab_size - 257:
        most = max(pair_counts.values(), default=0)
        if most < 2:
            break
        # of a tie the first in the alphabet
        best = min(pair for pair, n in pair_counts.items() if n == most)
        merges.append(best)
        for word in words_with.pop(best):        # only words that hold the pair change
            count_pairs(word, -counts[word])
            merged = []
            for part in parts_of[word]:          # left to right
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts_of[word] = merged
            count_pairs(word, counts[word])
    tokens = [*BYTE_OF, *map("".join, merges), "<|endoftext|>"]
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    files = {
        "vocab.json": _dump({token: i for i, token in enumerate(tokens)}),
        "merges.txt": "\n".join(lines).encode()
    }
    return _from_gpt2(files, {}, Path("trained BPE"))


def train_sentencepiece(texts, vocab_size):
    """A small LLaMA-like sentencepiece model: BPE with byte fallback, one token per digit, no
    normalisation; fewer pieces on little text.
    """
    lines = [line for text in texts for line in _replace_surrogates(text).split("\n") if line]
    if not lines:
        raise ValueError(
            "the texts to train sentencepiece on are empty; give it at least one line"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,                       # the same model every time
            minloglevel=2
        )
    except RuntimeError as error:
        raise ValueError(
            f"sentencepiece cannot make {vocab_size} pieces of these {len(lines)} lines ({error})"
        ) from error
    files = {"tokenizer.model": model.getvalue()}
    return _from_sentencepiece(files, {}, Path("trained sentencepiece"))


# --------------------------------------------------------------------------------- small parts

def _replace_surrogates(text):
    """Half a surrogate pair, which JSON can spell but UTF-8 cannot, becomes U+FFFD; a whole one
    becomes its character.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _checked_vocab(vocab, where):
    entries = vocab.items() if isinstance(vocab, dict) else ()
    valid = all(isinstance(token, str) and type(i) is int and i >= 0 for token, i in entries)
    if not entries or not valid or len(set(vocab.values())) != len(vocab):
        raise ValueError(
            f"{where}: a vocabulary maps each token to an id of its own, 0 or above; "
            "this one does not; download it again"
        )
    return vocab


def _dump(table):
    return (json.dumps(table, ensure_ascii=False, indent=2) + "\n").encode()
