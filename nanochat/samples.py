"""Samples that a training run shows: texts that are continued, questions that are answered."""
from nanochat.common import UserError
from nanochat.diffusion_engine import engine_of
from nanochat.engine import Stream


def begin(engine, start, max_new_tokens):
    """The pieces of text that continue a prompt, text or ids; what is wrong with it, if it is.

    Its sequence is admitted, so that whoever reads one continuation moves the others forward, too.
    """
    try:
        sequence = engine.new_sequence(start, max_new_tokens=max_new_tokens, temperature=0)
    except UserError as error:
        return [f"({error})"]
    engine.admit(sequence)
    return Stream(engine, sequence)


def sample_texts(model, tokenizer, prompts, max_new_tokens, ids_of=None, passages=None):
    """Continue each prompt greedily and print it: a list of {"prompt", "text"}.

    What went wrong is said in place of a text, a model that has diverged or a prompt that is longer
    than the context: the guard decides what becomes of a run.
    ids_of(prompt): the ids that stand for a prompt; None: its text. passages: of the engine.
    """
    was_training = model.training
    model.eval()
    engine = engine_of(model, tokenizer, passages)
    starts = [ids_of(prompt) if ids_of else prompt for prompt in prompts]
    streams = [begin(engine, start, max_new_tokens) for start in starts]
    samples = []
    for prompt, stream in zip(prompts, streams):
        try:
            text = "".join(stream)
        except UserError as error:
            text = f"({error})"
        samples.append({"prompt": prompt, "text": text})
        print(f"  {prompt}|{text!r}", flush=True)
    model.train(was_training)
    return samples


def sample_chats(model, tokenizer, questions, max_new_tokens, passages=None):
    """Answer each question greedily, as sample_texts() does."""
    def ids_of(question):
        message = {"role": "user", "content": question}
        return tokenizer.render_for_completion({"messages": [message]})

    return sample_texts(model, tokenizer, questions, max_new_tokens, ids_of, passages)
