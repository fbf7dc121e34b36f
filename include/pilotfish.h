/* Guards in an app that runs llama.cpp. Made from attach/src/abi.rs; how to use it: docs/attach.md and examples/c.
 *
 * Threads: `pilotfish_guards` may be used by any thread, several at once. A `pilotfish_context` is for one thread at a time, as the `llama_context` that it guards:
 * a second one that comes in the midst of a call gets PILOTFISH_RESULT_BUSY; between `_begin` and `_end`, while llama.cpp decodes, that is not seen.
 * `pilotfish_last_error` is each thread's own. Callbacks and resolvers must return: no exception and no longjmp may leave them.
 *
 * Lives: the model outlives the `llama_context`, which is freed before its `pilotfish_context`, which is freed before the model. `pilotfish_guards` may be freed at any time.
 *
 * C99 or newer, C++11 or newer.
 */

#ifndef PILOTFISH_H
#define PILOTFISH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct llama_model;
struct llama_context;
struct llama_batch;
struct ggml_tensor;

/*
 The version of this interface. It grows by functions; where one changes or goes, this number does.
 */
#define PILOTFISH_ABI_VERSION 1

/*
 How a call went. `pilotfish_last_error` says more of what is not `OK`.
 */
enum pilotfish_result
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  PILOTFISH_RESULT_OK = 0,
  /*
   A pointer that may not be null is, a text is not UTF-8, or a value is out of range.
   */
  PILOTFISH_RESULT_INVALID_ARGUMENT = 1,
  /*
   llama.cpp's functions are not found in the process, or this llama.cpp does not do what is relied upon.
   */
  PILOTFISH_RESULT_UNKNOWN_LLAMA = 2,
  /*
   The directory of guards can't be read, or no guard in it can guard this model.
   */
  PILOTFISH_RESULT_NO_GUARD = 3,
  /*
   There is nothing of that name or number.
   */
  PILOTFISH_RESULT_NOT_FOUND = 4,
  /*
   A setting that can't be.
   */
  PILOTFISH_RESULT_REFUSED = 5,
  /*
   `llama_decode` gave an error of its own.
   */
  PILOTFISH_RESULT_DECODE_FAILED = 6,
  /*
   A batch is begun, decoded and ended, one at a time.
   */
  PILOTFISH_RESULT_OUT_OF_ORDER = 7,
  /*
   Another thread is in a call with this context.
   */
  PILOTFISH_RESULT_BUSY = 8,
  /*
   A guard has ended an answer, and the logits could not be made to say so: they must not be used.
   */
  PILOTFISH_RESULT_NO_LOGITS = 9,
  /*
   A fault of this library's own.
   */
  PILOTFISH_RESULT_PANIC = 10,
  /*
   The audit log can't be written: what was decoded must not be used.
   */
  PILOTFISH_RESULT_NOT_ON_RECORD = 11,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum pilotfish_result pilotfish_result;
#else
typedef uint32_t pilotfish_result;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Why a sequence is to get no more tokens.
 */
enum pilotfish_end_reason
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /*
   It goes on.
   */
  PILOTFISH_END_REASON_NONE = 0,
  /*
   A gate that blocks has fired.
   */
  PILOTFISH_END_REASON_BLOCKED = 1,
  /*
   A guard failed.
   */
  PILOTFISH_END_REASON_FAULT = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum pilotfish_end_reason pilotfish_end_reason;
#else
typedef uint32_t pilotfish_end_reason;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 What guards one context of llama.cpp. One thread at a time, as for the context itself.
 */
typedef struct pilotfish_context pilotfish_context;

/*
 A directory of guards, watched. Any thread may use it, several at once.
 */
typedef struct pilotfish_guards pilotfish_guards;

/*
 The address of the function `name` of llama.cpp or ggml, or null; `data` is what was given with the resolver.
 */
typedef const void *(*pilotfish_resolver)(const char *name, void *data);

/*
 `ggml_backend_sched_eval_callback`
 */
typedef bool (*pilotfish_callback)(struct ggml_tensor *tensor, bool ask, void *user_data);

/*
 What a gate has decided of a sequence's prompt. Texts are valid until the next call with the same context.
 */
typedef struct pilotfish_gate {
  /*
   The guard's name.
   */
  const char *guard;
  /*
   The gate's name.
   */
  const char *gate;
  /*
   Whether the prompt has been read to its end, and the rest says something.
   */
  bool decided;
  bool fired;
  /*
   Whether there is a score: there is none where it could not be told what the gate has read, and it has fired then.
   */
  bool has_score;
  /*
   What is held against the gate's threshold.
   */
  double score;
} pilotfish_gate;

/*
 That a guard has ended a sequence. Texts are valid until the next call with the same context; those that say nothing are empty.
 */
typedef struct pilotfish_end {
  pilotfish_end_reason reason;
  /*
   The guard's name, or those of several.
   */
  const char *guard;
  /*
   The gate that has fired.
   */
  const char *gate;
  /*
   What the guard has to say to the user, or what went wrong.
   */
  const char *message;
} pilotfish_end;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 The version of Pilotfish, such as `0.1.0`.
 */
const char *pilotfish_version(void);

/*
 `PILOTFISH_ABI_VERSION` of the library that is loaded, to be compared with that of the header.
 */
uint32_t pilotfish_abi_version(void);

/*
 What went wrong in the last call of this thread that gave another result than `OK`. Never null; valid until the next call of this thread that fails.
 */
const char *pilotfish_last_error(void);

/*
 Reads the guards of a directory, which has a folder for each, and goes on watching it: what changes there is for prompts to come. llama.cpp's functions are
 looked up in what the process has loaded; an app that has llama.cpp linked in must export them (`-rdynamic`), or use `pilotfish_guards_open_with`.

 The log, which says what goes wrong behind an app's back, goes to standard error, where the environment variable `PILOTFISH_LOG` asks for one (`pilotfish=info,pilotfish_attach=debug`).

 Errors: `UNKNOWN_LLAMA`; `NO_GUARD` where the directory can't be read. A guard that can't be read is told of by `pilotfish_guards_problems`, and when a model
 is to be guarded.

 What the caller sees to:
 `directory` must end in a NUL; `guards` is where the result goes.
 */
pilotfish_result pilotfish_guards_open(const char *directory,
                                       struct pilotfish_guards **guards);

/*
 As `pilotfish_guards_open`, with llama.cpp's functions from `resolve`, which is called with their names before this returns, on this thread.

 What the caller sees to:
 As there. What `resolve` gives must be null or that function, all of one copy of llama.cpp, which stays loaded for as long as the process runs.
 */
pilotfish_result pilotfish_guards_open_with(const char *directory,
                                            pilotfish_resolver resolve,
                                            void *data,
                                            struct pilotfish_guards **guards);

/*
 Lets go of a directory of guards; null is let pass. Contexts that it guards stay guarded by what is in force.

 What the caller sees to:
 `guards` must be null or of `pilotfish_guards_open`, not freed before, and in no other call.
 */
void pilotfish_guards_free(struct pilotfish_guards *guards);

/*
 Looks at the directory now, before it is noticed that it has changed. `epoch`, unless it is null, becomes the number of what is in force, which grows with each
 change.

 What the caller sees to:
 `guards` must be of `pilotfish_guards_open`; `epoch` null or where the result goes.
 */
pilotfish_result pilotfish_guards_reload(const struct pilotfish_guards *guards,
                                         uint64_t *epoch);

/*
 Writes an audit log to the file `path`, as `pilotfish attach --audit` does, of the contexts that are made from now on: `pilotfish audit FILE` checks it. A decode
 that can't be put on record gives `NOT_ON_RECORD`.

 Errors: `NOT_ON_RECORD` where the file can't be written; `REFUSED` where there is an audit log already.

 What the caller sees to:
 `guards` must be of `pilotfish_guards_open`; `path` ends in a NUL.
 */
pilotfish_result pilotfish_guards_audit(const struct pilotfish_guards *guards,
                                        const char *path);

/*
 Turns a guard on or off, for prompts to come; its folder's name is taken too. It stays so when the guard is reloaded.

 Errors: `NOT_FOUND`; `REFUSED` where a loaded model can't be guarded so.

 What the caller sees to:
 `guards` must be of `pilotfish_guards_open`; texts end in NULs.
 */
pilotfish_result pilotfish_guards_enable(const struct pilotfish_guards *guards, const char *guard, bool enabled);

/*
 Sets an intervention of a guard, for prompts to come: the one called `intervention`, or all whose names go on from it with a dot. `setting` is `on`, `off` or a
 strength; null for what the guard's file says. It stays so when the guard is reloaded.

 Errors: `NOT_FOUND` where there is no such guard; `REFUSED` where it has no such intervention, or a loaded model can't be guarded so.

 What the caller sees to:
 As of `pilotfish_guards_enable`.
 */
pilotfish_result pilotfish_guards_set(const struct pilotfish_guards *guards,
                                      const char *guard,
                                      const char *intervention,
                                      const char *setting);

/*
 What is wrong with the directory, its guards, and what they are to guard: a line each, as many as fit in `size` bytes with a NUL behind them. Gives how many bytes
 all of it takes with its NUL; 1 where nothing is wrong, 0 where it can't be told.

 What the caller sees to:
 `guards` must be of `pilotfish_guards_open`, and `buffer` null or have room for `size` bytes.
 */
size_t pilotfish_guards_problems(const struct pilotfish_guards *guards,
                                 char *buffer,
                                 size_t size);

/*
 Prepares to guard a context of `model` that is to be made. Set `pilotfish_eval_callback` as `cb_eval` of its parameters and `pilotfish_context_user_data` as
 `cb_eval_user_data` (`PILOTFISH_ATTACH` does both), make the context, and decode by `pilotfish_context_decode`, or with `pilotfish_context_begin` before and
 `pilotfish_context_end` behind each `llama_decode`. What is decoded otherwise gets logits that are all 0.

 Errors: `NO_GUARD` where the directory has guards and none of them is for this model, or one was never readable; `UNKNOWN_LLAMA`.

 What the caller sees to:
 `guards` must be of `pilotfish_guards_open`, `model` a model of llama.cpp that lives as long as the context; `context` is where the result goes.
 */
pilotfish_result pilotfish_context_new(const struct pilotfish_guards *guards,
                                       const struct llama_model *model,
                                       struct pilotfish_context **context);

/*
 Frees what guards a context of llama.cpp, after that context has been freed; null is let pass.

 What the caller sees to:
 `context` must be null or of `pilotfish_context_new`, not freed before, in no other call, and llama.cpp must not use its callback any more.
 */
void pilotfish_context_free(struct pilotfish_context *context);

/*
 `cb_eval` of a guarded context's parameters.

 What the caller sees to:
 It is for llama.cpp alone to call.
 */
bool pilotfish_eval_callback(struct ggml_tensor *tensor, bool ask, void *user_data);

/*
 `cb_eval_user_data` of a guarded context's parameters: null where `context` is. With null, logits mean nothing, though `llama_decode` gives 0.

 What the caller sees to:
 `context` must be null or of `pilotfish_context_new`.
 */
void *pilotfish_context_user_data(const struct pilotfish_context *context);

/*
 Has an eval callback of the app's own run behind the guards: it sees what they have patched. Null for none.

 What the caller sees to:
 `context` must be of `pilotfish_context_new`; `callback` must be one that llama.cpp could call with `user_data`.
 */
pilotfish_result pilotfish_context_set_callback(const struct pilotfish_context *context, pilotfish_callback callback, void *user_data);

/*
 Has llama.cpp decode `batch` under the guards: `pilotfish_context_begin`, `llama_decode` and `pilotfish_context_end`. `llama_result`, unless it is null, becomes
 what `llama_decode` gave.

 Where a gate that blocks has fired, or a guard failed, the logits leave no token but those of the guard's message, one after another, and then the one that ends
 an answer: an app that just goes on says that. `pilotfish_context_ended` tells.

 Errors: `DECODE_FAILED`, where `llama_decode` gave anything but 0 (1: no room for the batch; nothing was decoded then, and it may be tried again); any other:
 what was decoded must not be used.

 What the caller sees to:
 As of `pilotfish_context_begin`.
 */
pilotfish_result pilotfish_context_decode(const struct pilotfish_context *context,
                                          struct llama_context *llama,
                                          const struct llama_batch *batch,
                                          int32_t *llama_result);

/*
 Tells of a batch that the app is about to decode by `llama_decode`. A decode that no guard was told of gets logits that are all 0.

 Which rows are of a prompt and which of an answer follows from positions, and from which tokens' logits are asked for (docs/attach.md), unless
 `pilotfish_context_begin_prompt` says it. The batch must be decoded as it is. Where a sampler on the device chooses tokens (`llama_set_sampler`), an answer can't be
 ended, and `pilotfish_context_end` gives `NO_LOGITS`.

 Errors: the batch must not be decoded.

 What the caller sees to:
 `context` must be of `pilotfish_context_new`, `llama` the context that was made with its callback, always the same, and `batch` valid as `llama_decode` would have it.
 */
pilotfish_result pilotfish_context_begin(const struct pilotfish_context *context,
                                         struct llama_context *llama,
                                         const struct llama_batch *batch);

/*
 Says that the batch of `pilotfish_context_begin` has been decoded, and that `llama_decode` gave `llama_result`. See `pilotfish_context_decode`.

 Errors: what was decoded must not be used.

 What the caller sees to:
 `context` must be of `pilotfish_context_new`, and its context of llama.cpp live.
 */
pilotfish_result pilotfish_context_end(const struct pilotfish_context *context,
                                       int32_t llama_result);

/*
 Copies cells by `llama_memory_seq_cp`, and takes note of it: positions from `first` to before `end` of the sequence `from` (below 0: all) to `to`, which should be
 empty. To one that is not, or from another position than the first, is what no gate has read the whole of: all of its gates count as fired.

 Errors: `OUT_OF_ORDER` where nothing was decoded yet, `INVALID_ARGUMENT` where the context has no such sequence.

 What the caller sees to:
 `context` must be of `pilotfish_context_new`, and its context of llama.cpp live.
 */
pilotfish_result pilotfish_context_copy_cells(const struct pilotfish_context *context,
                                              int32_t from,
                                              int32_t to,
                                              int32_t first,
                                              int32_t end);

/*
 Changes positions by `llama_memory_seq_add`, and takes note of it: those of a sequence from `first` to before `end` (below 0: all) by `by`.

 Errors: as of `pilotfish_context_copy_cells`.

 What the caller sees to:
 As there.
 */
pilotfish_result pilotfish_context_shift_cells(const struct pilotfish_context *context,
                                               int32_t sequence,
                                               int32_t first,
                                               int32_t end,
                                               int32_t by);

/*
 Says that the rows of a sequence that come next are another prompt's (a further turn of a talk), up to the last one of a batch whose logits are asked for: ask for
 those of the prompt's last token alone, or call this before each batch of it. Without it that follows from positions and logits, and a turn of
 at most 65 tokens of which each has its logits asked for, or that comes token by token, is taken for more of the answer, which gates of prompts don't read.

 What the caller sees to:
 `context` must be of `pilotfish_context_new`.
 */
pilotfish_result pilotfish_context_begin_prompt(const struct pilotfish_context *context,
                                                int32_t sequence);

/*
 Says that cells of a sequence (below 0: of all) were filled from elsewhere, as by `llama_state_seq_set_data`: no guard has read them, and every gate counts as
 fired.

 What the caller sees to:
 `context` must be of `pilotfish_context_new`.
 */
pilotfish_result pilotfish_context_loaded(const struct pilotfish_context *context,
                                          int32_t sequence);

/*
 How many gates read the prompts of a sequence; 0 where nothing of it was decoded.

 What the caller sees to:
 `context` must be of `pilotfish_context_new`.
 */
size_t pilotfish_context_n_gates(const struct pilotfish_context *context, int32_t sequence);

/*
 What the gate of number `index`, from 0, has decided of the prompt of a sequence. A decode answers for the gates whose prompts end in it.

 Errors: `NOT_FOUND`.

 What the caller sees to:
 `context` must be of `pilotfish_context_new`; `gate` is where the result goes.
 */
pilotfish_result pilotfish_context_gate(const struct pilotfish_context *context,
                                        int32_t sequence,
                                        size_t index,
                                        struct pilotfish_gate *gate);

/*
 Whether a guard has ended a sequence, and why.

 What the caller sees to:
 `context` must be of `pilotfish_context_new`; `end` is where the result goes.
 */
pilotfish_result pilotfish_context_ended(const struct pilotfish_context *context, int32_t sequence, struct pilotfish_end *end);

/*
 Sets an intervention of the guards that a sequence runs under, from its next token on: the one called `intervention` (`GUARD/INTERVENTION` where there are
 several guards), or all whose names go on from it with a dot. `setting` is `on`, `off` or a strength, as on the command line. Other sequences, and the prompts to
 come, keep theirs.

 Errors: `NOT_FOUND` where nothing of the sequence was decoded or no intervention has this name, `REFUSED` for a setting that can't be.

 What the caller sees to:
 `context` must be of `pilotfish_context_new`; texts end in NULs.
 */
pilotfish_result pilotfish_context_set(const struct pilotfish_context *context,
                                       int32_t sequence,
                                       const char *intervention,
                                       const char *setting);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PILOTFISH_H */

/* Has a context that is made with `params` (a `struct llama_context_params *`) guarded by `context`. */
#define PILOTFISH_ATTACH(context, params) \
    ((params)->cb_eval = pilotfish_eval_callback, (params)->cb_eval_user_data = pilotfish_context_user_data(context))
