"""
The server's API as an OpenAPI document, for clients and testing tools that read one.

It is made from the tables by which requests are read (openai_api.py), so that it says what they do.
"""
from nanochat.openai_api import MAX_STOPS, NUMBERS, REAL, TOP_LOGPROBS

ERRORS = {
    "400": "something is wrong with the request",
    "401": "a key is needed",
    "404": "there is no such model",
    "413": "the body is too large",
    "429": "the queue is full",
    "500": "the model failed",
    "503": "the model is not loaded, or the server is shutting down",
}
TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
FLAG = {"type": "boolean"}

MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [TEXT, {"type": "array"}, {"type": "null"}]},
    },
}

# Fields that chats and continuations share, but for those of NUMBERS
SHARED = {
    "model": TEXT,
    "stream": FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": FLAG}},
    "stop": {"anyOf": [TEXT, {**TEXTS, "minItems": 0, "maxItems": MAX_STOPS}]},
    "n": {"type": "integer", "minimum": 1},
    "logit_bias": {
        "type": "object",
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "ignore_eos": FLAG,
    "user": TEXT,
}
CHAT = {
    "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
    "logprobs": FLAG,
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": TOP_LOGPROBS},
    "continue_final_message": FLAG,
}
CONTINUATION = {
    "prompt": {"anyOf": [TEXT, TEXTS, IDS, {"type": "array", "items": IDS, "minItems": 1}]},
    "echo": FLAG,
    "truncate_prompt_tokens": {"type": ["integer", "null"], "minimum": -1, "not": {"const": 0}},
    "logprobs": {"type": "integer", "minimum": 0, "maximum": TOP_LOGPROBS},
}


def number_schema(rule):
    """The schema of a field of NUMBERS."""
    kind = "number" if rule.kinds == REAL else "integer"
    return {"type": kind, "minimum": rule.low, "maximum": rule.high}


def body_schema(fields, required):
    """The schema of a request's body. Every field but the required ones may be null."""
    numbers = {name: number_schema(rule) for name, rule in NUMBERS.items()}
    properties = {**numbers, **SHARED, **fields}
    for name in properties.keys() - set(required):
        properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
    return {"type": "object", "properties": properties, "required": required}


def answers():
    """The answers of every route: success, and the errors in OpenAI's shape."""
    error = {"$ref": "#/components/schemas/Error"}
    found = {"200": {"description": "the answer"}}
    for status, description in ERRORS.items():
        content = {"application/json": {"schema": error}}
        found[status] = {"description": description, "content": content}
    return found


def reading(summary):
    """A route that is read with GET."""
    return {"get": {"summary": summary, "responses": answers()}}


def asking(summary, schema):
    """A route that is sent a JSON body."""
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": answers()}}


def error_schema():
    """The shape of every error."""
    nullable = {"anyOf": [TEXT, {"type": "null"}]}
    fields = {"message": TEXT, "type": TEXT, "param": nullable, "code": nullable}
    error = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}


def openapi_schema(model):
    """The whole document, for a server of that model."""
    chat, continuation = body_schema(CHAT, ["messages"]), body_schema(CONTINUATION, [])
    return {
        "openapi": "3.1.0",
        "info": {"title": model, "version": "1"},
        "paths": {
            "/health": reading("whether the server is alive"),
            "/ready": reading("whether it answers requests"),
            "/metrics": reading("counters for Prometheus"),
            "/v1/models": reading("the model"),
            "/v1/chat/completions": asking("answer a conversation", chat),
            "/v1/completions": asking("continue a text", continuation),
        },
        "components": {
            "schemas": {"Error": error_schema()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
