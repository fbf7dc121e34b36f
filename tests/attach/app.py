"""An app that knows nothing of Pilotfish and looks llama.cpp's functions up by name: app.py FOLDER MODEL SEQUENCES [NODE ...]

FOLDER has the shared libraries. With NODEs it has an eval callback of its own, which asks for these. Each line that it reads is a list of things to do, one after another; it answers with a line of their results:
["decode", [[token, position, sequence, wants_logits], ...]]  result of llama_decode, and the likeliest token of each row that wants logits
["copy", from, to] ["remove", sequence, from, end] ["shift", sequence, from, end, by] ["save", sequence] ["load", sequence]
["seen"]                            since it was asked last: how many nodes the callback was asked about, and those it was shown, with their values
["put", node, values] ["stop", node] what the callback does from then on when it is shown a node: write values into it, or have the computing end there
["fork"]: a child that ends at once, as a process of its own does
"""

import ctypes as c
import glob
import json
import os
import signal
import sys


class Parameters(c.Structure):
    """Of a model or a context: larger than any llama.cpp has them, which takes and gives them by value in memory."""

    _fields_ = [("words", c.c_uint32 * 256)]


class Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


# As apps in C have it: a write to a pipe or socket that nobody reads ends them.
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
folder, model_path, n_sequences = sys.argv[1], sys.argv[2], int(sys.argv[3])
[llama_path] = glob.glob(os.path.join(folder, "libllama.*so*"))
llama = c.CDLL(llama_path)
[ggml_path] = glob.glob(os.path.join(folder, "libggml.*so*"))
ggml = c.CDLL(ggml_path)
ggml.ggml_backend_load_all_from_path(folder.encode())


def function(name, result, *arguments):
    found = getattr(llama, name)
    found.restype, found.argtypes = result, arguments
    return found


quiet = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)
llama.llama_log_set(quiet, None)
llama.llama_backend_init()
model_parameters = function("llama_model_default_params", Parameters)()
model = function("llama_model_load_from_file", c.c_void_p, c.c_char_p, Parameters)(model_path.encode(), model_parameters)
parameters = function("llama_context_default_params", Parameters)()
# n_ctx, n_batch, n_ubatch, n_seq_max
parameters.words[0:4] = [512 * n_sequences, 512, 512, n_sequences]

node_name = function("ggml_get_name", c.c_char_p, c.c_void_p)
node_size = function("ggml_nbytes", c.c_size_t, c.c_void_p)
node_get = function("ggml_backend_tensor_get", None, c.c_void_p, c.c_void_p, c.c_size_t, c.c_size_t)
node_set = function("ggml_backend_tensor_set", None, c.c_void_p, c.c_void_p, c.c_size_t, c.c_size_t)
wanted, to_put, stops_at = set(sys.argv[4:]), {}, None
n_asked, shown = 0, []


def on_node(node, ask, _):
    global n_asked
    name = node_name(node).decode()
    if ask:
        n_asked += 1
        return name in wanted
    values = (c.c_float * (node_size(node) // 4))()
    if name in to_put:
        values[:] = to_put[name]
        node_set(node, values, 0, node_size(node))
    node_get(node, values, 0, node_size(node))
    shown.append([name, list(values)])
    return name != stops_at


callback = c.CFUNCTYPE(c.c_bool, c.c_void_p, c.c_bool, c.c_void_p)(on_node)
if wanted:
    # No function sets it. Where it lies is told by the defaults around it: it and its user data are null, behind thresholds of -1 and before the cache's two types, f16.
    behind = [index for index in range(2, 250, 2) if parameters.words[index : index + 6] == [0, 0, 0, 0, 1, 1] and 0xBF800000 in parameters.words[index - 2 : index]]
    assert len(behind) == 1, f"the eval callback's place among the parameters of a context can't be told: {behind}"
    address = c.cast(callback, c.c_void_p).value
    parameters.words[behind[0] : behind[0] + 2] = [address & 0xFFFFFFFF, address >> 32]
context = function("llama_init_from_model", c.c_void_p, c.c_void_p, Parameters)(model, parameters)
function("llama_set_n_threads", None, c.c_void_p, c.c_int32, c.c_int32)(context, 1, 1)
memory = function("llama_get_memory", c.c_void_p, c.c_void_p)(context)
vocab = function("llama_model_get_vocab", c.c_void_p, c.c_void_p)(model)
n_vocab = function("llama_vocab_n_tokens", c.c_int32, c.c_void_p)(vocab)
decode = function("llama_decode", c.c_int32, c.c_void_p, Batch)
logits_of = function("llama_get_logits_ith", c.POINTER(c.c_float), c.c_void_p, c.c_int32)
sequence_copy = function("llama_memory_seq_cp", None, c.c_void_p, c.c_int32, c.c_int32, c.c_int32, c.c_int32)
sequence_remove = function("llama_memory_seq_rm", c.c_bool, c.c_void_p, c.c_int32, c.c_int32, c.c_int32)
sequence_shift = function("llama_memory_seq_add", None, c.c_void_p, c.c_int32, c.c_int32, c.c_int32, c.c_int32)
state_size = function("llama_state_seq_get_size", c.c_size_t, c.c_void_p, c.c_int32)
state_get = function("llama_state_seq_get_data", c.c_size_t, c.c_void_p, c.c_void_p, c.c_size_t, c.c_int32)
state_set = function("llama_state_seq_set_data", c.c_size_t, c.c_void_p, c.c_void_p, c.c_size_t, c.c_int32)
saved = None


def run(rows):
    n = len(rows)
    batch = Batch(
        n,
        (c.c_int32 * n)(*(row[0] for row in rows)),
        None,
        (c.c_int32 * n)(*(row[1] for row in rows)),
        (c.c_int32 * n)(*([1] * n)),
        (c.POINTER(c.c_int32) * n)(*((c.c_int32 * 1)(row[2]) for row in rows)),
        (c.c_int8 * n)(*(int(row[3]) for row in rows)),
    )
    result = decode(context, batch)
    if result:
        return [result]
    likeliest = []
    for index in (index for index, row in enumerate(rows) if row[3]):
        logits = logits_of(context, index)[:n_vocab]
        likeliest.append(max(range(n_vocab), key=logits.__getitem__))
    return [result, *likeliest]


def do(what, *arguments):
    global saved, n_asked, stops_at
    if what == "decode":
        return run(*arguments)
    if what == "copy":
        return sequence_copy(memory, *arguments, -1, -1)
    if what == "remove":
        return sequence_remove(memory, *arguments)
    if what == "shift":
        return sequence_shift(memory, *arguments)
    if what == "save":
        saved = c.create_string_buffer(state_size(context, *arguments))
        return state_get(context, saved, len(saved), *arguments)
    if what == "load":
        return state_set(context, saved, len(saved), *arguments)
    if what == "seen":
        seen = {"n_asked": n_asked, "shown": shown.copy()}
        n_asked = 0
        shown.clear()
        return seen
    if what == "put":
        return to_put.update([arguments])
    if what == "stop":
        [stops_at] = arguments
        return None
    if what == "fork":
        child = os.fork()
        if not child:
            c.CDLL(None).exit(0)
        return os.waitpid(child, 0)[1]
    raise ValueError(what)


print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps([do(*thing) for thing in json.loads(line)]), flush=True)
