"""A guarded model in an app of one's own, by llama-cpp-python: guarded.py MODEL.gguf GUARDS "a prompt"

The library libpilotfish_attach is called by ctypes: from where PILOTFISH_ATTACH_LIBRARY says, or where the system looks for libraries.
"""

import ctypes
import os
import sys

import llama_cpp

lib = ctypes.CDLL(os.environ.get("PILOTFISH_ATTACH_LIBRARY", "libpilotfish_attach.so"))
lib.pilotfish_last_error.restype = ctypes.c_char_p
lib.pilotfish_context_user_data.restype = ctypes.c_void_p
lib.pilotfish_context_n_gates.restype = ctypes.c_size_t
lib.pilotfish_guards_free.restype = lib.pilotfish_context_free.restype = None


class Gate(ctypes.Structure):
    """`pilotfish_gate`"""

    _fields_ = [
        ("guard", ctypes.c_char_p),
        ("gate", ctypes.c_char_p),
        ("decided", ctypes.c_bool),
        ("fired", ctypes.c_bool),
        ("has_score", ctypes.c_bool),
        ("score", ctypes.c_double),
    ]


class End(ctypes.Structure):
    """`pilotfish_end`"""

    _fields_ = [("reason", ctypes.c_uint32), ("guard", ctypes.c_char_p), ("gate", ctypes.c_char_p), ("message", ctypes.c_char_p)]


def check(result):
    if result:
        raise RuntimeError(lib.pilotfish_last_error().decode())


def main(model_path, guards_path, prompt):
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit(f"{model_path} is no model")

    guards, guard = ctypes.c_void_p(), ctypes.c_void_p()
    check(lib.pilotfish_guards_open(guards_path.encode(), ctypes.byref(guards)))
    check(lib.pilotfish_context_new(guards, ctypes.c_void_p(model), ctypes.byref(guard)))
    params = llama_cpp.llama_context_default_params()
    params.cb_eval = type(params.cb_eval)(ctypes.cast(lib.pilotfish_eval_callback, ctypes.c_void_p).value)
    params.cb_eval_user_data = lib.pilotfish_context_user_data(guard)
    context = llama_cpp.llama_init_from_model(model, params)

    vocab = llama_cpp.llama_model_get_vocab(model)
    text = by_template(model, prompt)
    tokens = (llama_cpp.llama_token * (len(text) + 2))()
    n = llama_cpp.llama_tokenize(vocab, text, len(text), tokens, len(tokens), True, True)
    sampler = llama_cpp.llama_sampler_init_greedy()
    batch = llama_cpp.llama_batch_get_one(tokens, n)
    piece = ctypes.create_string_buffer(128)
    for _ in range(48):
        # In the place of llama_decode. Where a guard blocks, what is sampled then is the guard's message.
        check(lib.pilotfish_context_decode(guard, ctypes.c_void_p(context), ctypes.byref(batch), None))
        token = llama_cpp.llama_sampler_sample(sampler, context, -1)
        if llama_cpp.llama_vocab_is_eog(vocab, token):
            break
        length = llama_cpp.llama_token_to_piece(vocab, token, piece, len(piece), 0, False)
        sys.stdout.buffer.write(piece.raw[:length])
        tokens[0] = token
        batch = llama_cpp.llama_batch_get_one(tokens, 1)
    sys.stdout.buffer.write(b"\n")

    for index in range(lib.pilotfish_context_n_gates(guard, 0)):
        gate = Gate()
        check(lib.pilotfish_context_gate(guard, 0, ctypes.c_size_t(index), ctypes.byref(gate)))
        # Where it can't be told what a gate has read it has fired, and has no score.
        said = [f"score {gate.score:.4f}"] * gate.has_score + ["fired"] * gate.fired
        print(f"{gate.guard.decode()}/{gate.gate.decode()}: {', '.join(said) or 'undecided'}", file=sys.stderr)
    end = End()
    check(lib.pilotfish_context_ended(guard, 0, ctypes.byref(end)))
    if end.reason:
        print(f"{end.guard.decode()} has ended the answer: {end.message.decode()}", file=sys.stderr)

    llama_cpp.llama_sampler_free(sampler)
    llama_cpp.llama_free(context)
    lib.pilotfish_context_free(guard)
    lib.pilotfish_guards_free(guards)
    llama_cpp.llama_model_free(model)
    return 1 if end.reason else 0


@llama_cpp.llama_log_callback
def quiet(level, text, _data):
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def by_template(model, prompt):
    """The user's turn, by the model's chat template."""
    turn = llama_cpp.llama_chat_message(role=b"user", content=prompt.encode())
    template = llama_cpp.llama_model_chat_template(model, None)
    text = ctypes.create_string_buffer(len(prompt.encode()) + 4096)
    n = llama_cpp.llama_chat_apply_template(template, (llama_cpp.llama_chat_message * 1)(turn), 1, True, text, len(text)) if template else -1
    return text.raw[:n] if n >= 0 else f"Instruction: {prompt}\nResponse:".encode()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: guarded.py MODEL.gguf GUARDS PROMPT")
    try:
        sys.exit(main(*sys.argv[1:]))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
