"""
OpenAI's API as data: what a request may say, and what an answer looks like.

Pure functions, without a server and without a model. Those that read a request raise an ApiError,
whose status, sentence and field the caller sees; those that write an answer return dicts that
become JSON.

A field falls into one of four kinds. NUMBERS and the fields with a reader of their own are done. A
field of UNSUPPORTED would change the answer in a way that this server cannot, so that any value
but those which ask for nothing is refused. Whatever else a client sends is ignored.
"""
import codecs
import json
import math
import time
import uuid
from collections import namedtuple

from nanochat.common import UserError
from nanochat.conversation import normalise_messages

MAX_MESSAGE = 400           # characters of an error's sentence: it may quote what was sent
MAX_TOKENS_BOUND = 2**20    # of max_tokens; below, an answer is cut to what the context holds
MAX_STOPS, MAX_STOP_LENGTH = 4, 500     # stop texts, and characters of one
MAX_BIASES = 1000
TOP_LOGPROBS = 20
LOWEST_LOGPROB = -9999.0    # JSON has no -Infinity

# How a field of numbers is read. kinds: the types that are allowed, of which bool is none.
Number = namedtuple("Number", "low high kinds default")
WHOLE, REAL = (int,), (int, float)
NUMBERS = {
    "max_tokens": Number(1, MAX_TOKENS_BOUND, WHOLE, None),
    "max_completion_tokens": Number(1, MAX_TOKENS_BOUND, WHOLE, None),
    "temperature": Number(0, 2, REAL, None),
    "top_k": Number(-1, 2**31, WHOLE, None),
    "top_p": Number(0, 1, REAL, 1.0),
    "min_p": Number(0, 1, REAL, 0.0),
    "presence_penalty": Number(-2, 2, REAL, 0.0),
    "frequency_penalty": Number(-2, 2, REAL, 0.0),
    "repetition_penalty": Number(0.01, 10, REAL, 1.0),
    "seed": Number(-2**63, 2**63 - 1, WHOLE, None),
}
TRUNCATION = Number(-1, MAX_TOKENS_BOUND, WHOLE, None)
SMALLEST_TOP_P = 1e-6       # top_p=0 is what some clients send for "the likeliest token"

# Fields that this server cannot honour, with the values that ask for nothing. None is one of them.
UNSUPPORTED = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "audio": (),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "structured_outputs": ({},),
    "grammar": ("",),
    "json_schema": (),
    "stop_token_ids": ([],),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "web_search_options": (),
    "suffix": ("",),
}
NO_TOOLS = (
    'tools are not supported: this model has only its own calculator. Leave tools out, or send '
    'tool_choice "none"'
)

# Parts of a message that no model here can read, by the first word of their type
MEDIA = {"image": "images", "audio": "audio", "video": "videos", "file": "files"}


class ApiError(Exception):
    """A request refused: HTTP status, one line for the caller, and the field it is about.

    retry_after: seconds after which the same request may succeed, or None.
    """

    def __init__(self, status, message, param=None, code=None, retry_after=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after = retry_after


def status_of(error):
    """The HTTP status of an exception: its own, else 400 for bad input and 500 for a failure."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    return 400 if isinstance(error, UserError) else 500


def error_body(error):
    """Any exception in OpenAI's shape. Only messages meant for users are shown."""
    known = isinstance(error, (ApiError, UserError))
    message = str(error) if known else "the model failed; the server's log says why"
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + "..."
    return {
        "error": {
            "message": message,
            "type": error_type(status_of(error)),
            "param": error.param if isinstance(error, ApiError) else None,
            "code": error.code if isinstance(error, ApiError) else None,
        }
    }


def error_type(status):
    """OpenAI's name for the kind of error that a status stands for."""
    names = {401: "authentication_error", 429: "rate_limit_error"}
    usual = "invalid_request_error" if status < 500 else "server_error"
    return names.get(status, usual)


# ------------------------------------------------------------------------------------------------
# reading the fields of a request

# What a request is read against: the model's name, whether it is a base model, the length of its
# context, the size of its vocabulary, the most choices of one request, and what holds where a
# request does not say.
Served = namedtuple(
    "Served",
    "model continues context vocab_size max_choices temperature top_k max_tokens",
)

# What was asked for. options: of Engine.new_sequence(), but for the prompt; n: choices of each
# prompt; stop: texts; echo: whether the prompt is repeated; scoring: nothing is generated, the
# prompt's own logprobs are wanted; truncate: how many of a prompt's last tokens are kept, -1: what
# leaves room for the answer, None: all of them.
Asked = namedtuple(
    "Asked",
    "options n stop stream include_usage logprobs echo scoring truncate",
    defaults=(None,),
)


def parse_body(body):
    """The bytes of a body as a dict."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    return fields


def read_number(fields, name, rule, default=None):
    """The number in a field, or the default where it is absent. NaN and booleans are no numbers."""
    value = fields.get(name)
    if value is None:
        return rule.default if default is None else default
    if type(value) not in rule.kinds or not rule.low <= value <= rule.high:
        kind = "number" if float in rule.kinds else "whole number"
        problem = f"{name} must be a {kind} from {rule.low} to {rule.high}"
        raise ApiError(400, problem, name)
    return value


def read_typed(fields, name, default):
    """The value of a field, which must have the type of its default."""
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not type(default):
        kind = "true or false" if type(default) is bool else "an object"
        raise ApiError(400, f"{name} must be {kind}", name)
    return value


def read_stops(fields):
    """The texts before which an answer ends: a list of 0 to 4."""
    stops = fields.get("stop") or []
    if isinstance(stops, str):
        stops = [stops]
    texts = isinstance(stops, list) and all(stop and isinstance(stop, str) for stop in stops)
    if not texts or len(stops) > MAX_STOPS:
        raise ApiError(400, f"stop must be a text or a list of up to {MAX_STOPS} texts", "stop")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_LENGTH:
        problem = f"a stop text has {longest} characters: it may have {MAX_STOP_LENGTH}"
        raise ApiError(400, problem, "stop")
    return stops


def read_bias(fields, vocab_size):
    """{token id: what is added to its logit}, from {"50": -100}."""
    given = read_typed(fields, "logit_bias", {})
    if len(given) > MAX_BIASES:
        problem = f"logit_bias has {len(given)} entries: it may have {MAX_BIASES}"
        raise ApiError(400, problem, "logit_bias")
    bias = {}
    for key, value in given.items():
        is_id = key.isascii() and key.isdecimal() and len(key) < 10
        if not is_id or int(key) >= vocab_size:
            problem = f"a key of logit_bias must be a token id from 0 to {vocab_size - 1}"
            raise ApiError(400, problem, "logit_bias")
        if type(value) not in REAL or not -100 <= value <= 100:
            problem = "a value of logit_bias must be a number from -100 to 100"
            raise ApiError(400, problem, "logit_bias")
        bias[int(key)] = float(value)
    return bias


def read_chat_logprobs(fields):
    """How many alternatives of each token a chat asks for: None where it asks for no logprobs."""
    wanted = read_typed(fields, "logprobs", False)
    top = read_number(fields, "top_logprobs", Number(0, TOP_LOGPROBS, WHOLE, 0))
    if top and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return top if wanted else None


def read_text_logprobs(fields):
    """The same for a continuation, whose field is a number; true is taken for 1, false for none."""
    value = fields.get("logprobs")
    if type(value) is bool:
        return 1 if value else None
    return read_number(fields, "logprobs", Number(0, TOP_LOGPROBS, WHOLE, None))


def check_model(name, served):
    """ApiError for another model than ours."""
    if name is not None and name != served.model:
        problem = f"this server has one model, {served.model}"
        raise ApiError(404, problem, "model", "model_not_found")


def check_supported(fields):
    """ApiError for a field that this server cannot honour."""
    for name, harmless in UNSUPPORTED.items():
        value = fields.get(name)
        if value is not None and not is_one_of(value, harmless):
            raise ApiError(400, f"{name} is not supported here", name, "unsupported_parameter")
    tools = fields.get("tools")
    if tools not in (None, []) and fields.get("tool_choice") != "none":
        raise ApiError(400, NO_TOOLS, "tools", "unsupported_parameter")


def is_one_of(value, values):
    """Whether a value is one of some others, of the same type: True is not 1."""
    return any(type(value) is type(other) and value == other for other in values)


def read_limit(fields, served):
    """The most tokens to generate. max_completion_tokens wins over max_tokens."""
    limit = read_number(fields, "max_tokens", NUMBERS["max_tokens"], served.max_tokens)
    rule = NUMBERS["max_completion_tokens"]
    return min(read_number(fields, "max_completion_tokens", rule, limit), served.context)


def read_options(fields, served):
    """The options of a sequence that chats and continuations share."""
    def number(name, default=None):
        return read_number(fields, name, NUMBERS[name], default)

    top_k = number("top_k", served.top_k)
    return {
        "max_new_tokens": read_limit(fields, served),
        "temperature": float(number("temperature", served.temperature)),
        "top_k": min(max(top_k, 0), served.vocab_size),     # -1 and 0: all tokens
        "top_p": max(float(number("top_p")), SMALLEST_TOP_P),
        "min_p": float(number("min_p")),
        "presence_penalty": float(number("presence_penalty")),
        "frequency_penalty": float(number("frequency_penalty")),
        "repetition_penalty": float(number("repetition_penalty")),
        "logit_bias": read_bias(fields, served.vocab_size),
        "seed": number("seed"),     # None: the server draws one for each prompt
        "ignore_stop_tokens": read_typed(fields, "ignore_eos", False),
    }


def read_common(fields, served, logprobs, echo=False, scoring=False):
    """An Asked, from the fields that chats and continuations share."""
    check_model(fields.get("model"), served)
    check_supported(fields)
    n = read_number(fields, "n", Number(1, served.max_choices, WHOLE, 1))
    best_of = fields.get("best_of")
    if best_of is not None and not is_one_of(best_of, [n]):
        problem = f"best_of is not supported: leave it out, or send n={n}"
        raise ApiError(400, problem, "best_of", "unsupported_parameter")

    usage = read_typed(fields, "stream_options", {})
    return Asked(
        options={**read_options(fields, served), "logprobs": logprobs},
        n=n,
        stop=read_stops(fields),
        stream=read_typed(fields, "stream", False),
        include_usage=read_typed(usage, "include_usage", False),
        logprobs=logprobs,
        echo=echo,
        scoring=scoring,
    )


def read_chat(fields, served):
    """An Asked, from the fields of a chat other than its messages."""
    if read_typed(fields, "echo", False):
        raise ApiError(400, "echo is not supported here", "echo", "unsupported_parameter")
    return read_common(fields, served, read_chat_logprobs(fields))


def read_continuation(fields, served):
    """An Asked, from the fields of a continuation other than its prompt.

    max_tokens=0 with echo scores a text: the prompt comes back with its logprobs, and nothing else.
    """
    echo = read_typed(fields, "echo", False)
    logprobs = read_text_logprobs(fields)
    scoring = echo and is_one_of(fields.get("max_tokens"), [0])
    if scoring:
        fields = {**fields, "max_tokens": 1}    # the engine generates at least one
    asked = read_common(fields, served, logprobs, echo, scoring)
    if echo and logprobs is not None:
        asked.options["prompt_logprobs"] = True
    return asked._replace(truncate=read_truncation(fields))


def read_truncation(fields):
    """How many of a prompt's last tokens are kept, by vLLM's field: None, -1, or at least 1."""
    kept = read_number(fields, "truncate_prompt_tokens", TRUNCATION)
    if kept == 0:
        problem = "truncate_prompt_tokens must be at least 1, or -1 to leave room for the answer"
        raise ApiError(400, problem, "truncate_prompt_tokens")
    return kept


# ------------------------------------------------------------------------------------------------
# reading messages and prompts

def refuse_media(messages):
    """ApiError for a message with an image or a sound."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        words = kind.removeprefix("input_").split("_") if isinstance(kind, str) else [""]
        if words[0] in MEDIA:
            problem = f"{MEDIA[words[0]]} are not supported: this model reads text only"
            raise ApiError(400, problem, "messages", "unsupported_content")


def without_emptied(messages):
    """The messages but for the user's that hold nothing, as a client leaves them behind that
    empties a turn. The last message stays: that one is to be answered."""
    kept = []
    for number, message in enumerate(messages, start=1):
        is_user = isinstance(message, dict) and message.get("role") == "user"
        is_emptied = is_user and message.get("content") in ("", [], None)
        if not is_emptied or number == len(messages):
            kept.append(message)
    return kept


def read_messages(fields):
    """The messages of a chat, well formed. The last one is the user's, or one of the assistant's
    that the answer continues."""
    messages = fields.get("messages")
    if isinstance(messages, list):
        refuse_media(messages)
        messages = without_emptied(messages)
    try:
        messages = normalise_messages(messages)
    except (UserError, RecursionError) as error:
        known = isinstance(error, UserError)
        problem = str(error) if known else "messages are nested too deeply"
        raise ApiError(400, problem, "messages") from error
    check_last(messages, fields)
    return messages


def check_last(messages, fields):
    """ApiError unless the last of well-formed messages is one that can be answered."""
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise ApiError(400, "the messages hold no question: add one of the user's", "messages")
    continues = read_typed(fields, "continue_final_message", roles[-1] == "assistant")
    if continues and roles[-1] != "assistant":
        problem = "continue_final_message needs a last message that is the assistant's"
        raise ApiError(400, problem, "continue_final_message")
    if not continues and roles[-1] != "user":
        raise ApiError(400, "the last message must be the user's", "messages")


def read_prompts(fields, served):
    """The prompts of a continuation, a list; each is a text or a list of token ids."""
    given = "" if fields.get("prompt") is None else fields["prompt"]
    if isinstance(given, str):
        return [readable(given)]
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"prompt must be {PROMPT_FORMS}", "prompt")
    if type(given[0]) is int:
        return [check_ids(given, served.vocab_size)]
    return [read_prompt(item, served.vocab_size) for item in given]


PROMPT_FORMS = "a text, a list of texts, a list of token ids, or a list of such lists"


def read_prompt(item, vocab_size):
    """One of several prompts."""
    if isinstance(item, str):
        return readable(item)
    if isinstance(item, list) and item:
        return check_ids(item, vocab_size)
    raise ApiError(400, f"prompt must be {PROMPT_FORMS}", "prompt")


def check_ids(ids, vocab_size):
    """A list that must hold token ids only."""
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            problem = f"prompt: a token id must be a whole number from 0 to {vocab_size - 1}"
            raise ApiError(400, problem, "prompt")
    return ids


def readable(text):
    """A text with "?" for each half of a character, which UTF-8 lacks."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ------------------------------------------------------------------------------------------------
# writing an answer

def head_of(kind, prefix, model_name):
    """The fields that every object of one answer has. kind: OpenAI's name for such objects."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model_name,
    }


def usage_of(prompt_tokens, completion_tokens, cached_tokens):
    """The usage of an answer. cached_tokens: of the prompt, those that were not computed again."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def event(fields):
    """A server-sent event."""
    return f"data: {json.dumps(fields)}\n\n"


def as_json_logprob(logprob):
    """A logprob that JSON can hold."""
    return max(logprob, LOWEST_LOGPROB) if math.isfinite(logprob) else LOWEST_LOGPROB


def token_text(tokenizer, token):
    """The text of one token; of one that is a piece of a character, its bytes as OpenAI writes
    them: "bytes:\\xe2"."""
    data = tokenizer.id_to_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer, entries):
    """The logprobs of a chat's choice, from a list of TokenLogprob."""
    def shape(token, logprob):
        return {
            "token": token_text(tokenizer, token),
            "logprob": as_json_logprob(logprob),
            "bytes": list(tokenizer.id_to_bytes(token)),
        }

    content = []
    for entry in entries:
        top = [shape(token, logprob) for token, logprob in entry.top]
        content.append({**shape(entry.token, entry.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer, entries, tokens, offset=0):
    """The logprobs of a continuation's choice.

    entries: TokenLogprobs, None for a first token that nothing comes before; tokens: their ids;
    offset: characters of the choice's text before the first of them.
    """
    shape = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token, entry in zip(tokens, entries):
        shape["tokens"].append(token_text(tokenizer, token))
        shape["text_offset"].append(offset)
        offset += len(characters.decode(tokenizer.id_to_bytes(token)))
        logprob = None if entry is None else as_json_logprob(entry.logprob)
        shape["token_logprobs"].append(logprob)
        shape["top_logprobs"].append(None if entry is None else top_texts(tokenizer, entry))
    return shape


def top_texts(tokenizer, entry):
    """{text of a token: its logprob} of the alternatives; the likelier of two with one text."""
    best = {}
    for token, logprob in entry.top:
        best.setdefault(token_text(tokenizer, token), as_json_logprob(logprob))
    return best


def chat_choice(index, text, logprobs=None, finish_reason=None):
    """A choice of a chat that is answered at once."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }


def chat_chunk(index, delta, logprobs=None, finish_reason=None):
    """A choice of a chunk of a chat. delta: what is new of the message."""
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }


def text_choice(index, text, logprobs=None, finish_reason=None):
    """A choice of a continuation, all of it or a piece."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
