/* The C interface, used well and badly: abi MODEL GUARDS BLOCKING PROMPT HARMLESS MESSAGE. For tests/suite/c_interface.rs, with the fixture's model, one guard of
 * it, which steers, the same guard where it blocks with MESSAGE, a prompt for which its gate fires, and one for which it does not. Prints `done`. */

#define _GNU_SOURCE
#include <llama.h>
#include <pilotfish.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(bool holds, const char * what, int line) {
    if (!holds) {
        fprintf(stderr, "line %d: %s does not hold; last error: %s\n", line, what, pilotfish_last_error());
        exit(3);
    }
}
#define CHECK(holds) check(holds, #holds, __LINE__)
#define OK(call) CHECK((call) == PILOTFISH_RESULT_OK)
/* A call that fails in this way, and says so in these words. */
#define FAILS(call, result, words) (CHECK((call) == PILOTFISH_RESULT_##result), CHECK(strstr(pilotfish_last_error(), words) != NULL))

static void quiet(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static llama_token PROMPT[32], HARMLESS[32];
static int N_TOKENS, N_HARMLESS;

/* `n` tokens of a sequence from position `first` on, the last with logits. */
static void fill(struct llama_batch * batch, const llama_token * tokens, int n, int first, int sequence) {
    batch->n_tokens = n;
    for (int i = 0; i < n; i++) {
        batch->token[i] = tokens[i];
        batch->pos[i] = first + i;
        batch->n_seq_id[i] = 1;
        batch->seq_id[i][0] = sequence;
        batch->logits[i] = i + 1 == n;
    }
}

static int likeliest(const float * logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return best;
}

static float largest(const float * logits, int n) {
    float found = 0;
    for (int i = 0; i < n; i++) {
        const float size = logits[i] < 0 ? -logits[i] : logits[i];
        found = size > found ? size : found;
    }
    return found;
}

struct seen {
    int n_asked, n_shown;
    pilotfish_context * guard;
};

/* An app's own callback, which looks at one tensor. */
static bool look(struct ggml_tensor * tensor, bool ask, void * data) {
    struct seen * seen = data;
    if (ask) {
        seen->n_asked++;
        return strcmp(ggml_get_name(tensor), "result_norm") == 0;
    }
    seen->n_shown++;
    /* In the midst of a call, as another thread would be. */
    pilotfish_gate gate;
    FAILS(pilotfish_context_gate(seen->guard, 0, 0, &gate), BUSY, "one thread at a time");
    return true;
}

static void * elsewhere(void * context) {
    /* What failed on the other thread is not told here. */
    CHECK(strcmp(pilotfish_last_error(), "") == 0);
    pilotfish_gate gate;
    FAILS(pilotfish_context_gate(context, 7, 0, &gate), NOT_FOUND, "sequence 7");
    return NULL;
}

static const void * resolve(const char * name, void * data) {
    (*(int *) data)++;
    return strcmp(name, "llama_decode") == 0 ? NULL : (const void *) (size_t) llama_n_ctx;
}

/* What is said in place of an answer goes on where it was, also behind decodes that llama.cpp refuses: of an answer's next token, and of a further prompt. */
static void says_its_message(struct llama_model * model, const char * directory, const char * message) {
    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    llama_token said[32];
    const int n_said = llama_tokenize(vocab, message, (int) strlen(message), said, 31, false, false);
    CHECK(n_said > 3);
    said[n_said] = llama_vocab_eot(vocab) == LLAMA_TOKEN_NULL ? llama_vocab_eos(vocab) : llama_vocab_eot(vocab);
    pilotfish_guards * guards;
    pilotfish_context * guard;
    OK(pilotfish_guards_open(directory, &guards));
    OK(pilotfish_context_new(guards, model, &guard));
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 256;
    PILOTFISH_ATTACH(guard, &params);
    struct llama_context * context = llama_init_from_model(model, params);
    CHECK(context != NULL);
    struct llama_batch batch = llama_batch_init(64, 0, 1);
    fill(&batch, PROMPT, N_TOKENS, 0, 0);
    for (int i = 0; i <= n_said; i++) {
        OK(pilotfish_context_decode(guard, context, &batch, NULL));
        pilotfish_end end;
        OK(pilotfish_context_ended(guard, 0, &end));
        CHECK(end.reason == PILOTFISH_END_REASON_BLOCKED && strcmp(end.message, message) == 0);
        CHECK(likeliest(llama_get_logits_ith(context, -1), llama_vocab_n_tokens(vocab)) == said[i]);
        const int next = N_TOKENS + i;
        fill(&batch, said, 1, next + 5, 0);
        FAILS(pilotfish_context_decode(guard, context, &batch, NULL), DECODE_FAILED, "llama_decode");
        fill(&batch, HARMLESS, N_HARMLESS, next + 5, 0);
        FAILS(pilotfish_context_decode(guard, context, &batch, NULL), DECODE_FAILED, "llama_decode");
        fill(&batch, said + i, 1, next, 0);
    }
    llama_batch_free(batch);
    llama_free(context);
    pilotfish_context_free(guard);
    pilotfish_guards_free(guards);
}

int main(int argc, char ** argv) {
    if (argc != 7) {
        return 64;
    }
    llama_log_set(quiet, NULL);
    CHECK(pilotfish_abi_version() == PILOTFISH_ABI_VERSION);
    CHECK(strlen(pilotfish_version()) >= 5);

    /* Nothing that is wrong is let in. */
    pilotfish_guards * guards = NULL;
    pilotfish_context * guard = NULL;
    int n_looked_up = 0;
    FAILS(pilotfish_guards_open(NULL, &guards), INVALID_ARGUMENT, "`directory` is null");
    FAILS(pilotfish_guards_open(argv[2], NULL), INVALID_ARGUMENT, "`guards` is null");
    FAILS(pilotfish_guards_open("\xff", &guards), INVALID_ARGUMENT, "UTF-8");
    FAILS(pilotfish_guards_open("/there/is/no/such/directory", &guards), NO_GUARD, "/there/is/no/such/directory");
    char own[4096];
    snprintf(own, sizeof own, "%s/guard", argv[2]);
    FAILS(pilotfish_guards_open(own, &guards), NO_GUARD, "own folder");
    FAILS(pilotfish_guards_open_with(argv[2], NULL, NULL, &guards), INVALID_ARGUMENT, "`resolve` is null");
    FAILS(pilotfish_guards_open_with(argv[2], resolve, &n_looked_up, &guards), UNKNOWN_LLAMA, "llama_decode");
    CHECK(n_looked_up > 0 && guards == NULL);
    FAILS(pilotfish_guards_reload(NULL, NULL), INVALID_ARGUMENT, "`guards` is null");
    FAILS(pilotfish_context_new(NULL, NULL, &guard), INVALID_ARGUMENT, "`guards` is null");
    FAILS(pilotfish_context_end(NULL, 0), INVALID_ARGUMENT, "`context` is null");
    CHECK(pilotfish_context_user_data(NULL) == NULL);
    /* It asks for each node, and stops the graph there. */
    CHECK(pilotfish_eval_callback(NULL, true, NULL) && !pilotfish_eval_callback(NULL, false, NULL));
    CHECK(pilotfish_context_n_gates(NULL, 0) == 0);
    pilotfish_guards_free(NULL);
    pilotfish_context_free(NULL);

    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    CHECK(model != NULL);
    N_TOKENS = llama_tokenize(llama_model_get_vocab(model), argv[4], (int) strlen(argv[4]), PROMPT, 32, true, true);
    N_HARMLESS = llama_tokenize(llama_model_get_vocab(model), argv[5], (int) strlen(argv[5]), HARMLESS, 32, true, true);
    CHECK(N_TOKENS > 2 && N_HARMLESS > 2);
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    OK(pilotfish_guards_open(argv[2], &guards));
    char problems[64];
    CHECK(pilotfish_guards_problems(guards, problems, sizeof problems) == 1 && problems[0] == 0);
    FAILS(pilotfish_context_new(guards, NULL, &guard), INVALID_ARGUMENT, "`model` is null");
    OK(pilotfish_context_new(guards, model, &guard));

    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 256;
    params.n_seq_max = 4;
    params.kv_unified = true;
    struct llama_context * alone = llama_init_from_model(model, params);
    PILOTFISH_ATTACH(guard, &params);
    struct llama_context * context = llama_init_from_model(model, params);
    CHECK(alone && context);
    struct llama_batch batch = llama_batch_init(64, 0, 2);

    /* A decode that was not announced means nothing, and counts as read by nobody. */
    fill(&batch, PROMPT, N_TOKENS, 0, 0);
    CHECK(llama_decode(context, batch) == 0);
    CHECK(largest(llama_get_logits_ith(context, -1), n_vocab) == 0);
    fill(&batch, PROMPT, 1, N_TOKENS, 0);
    OK(pilotfish_context_decode(guard, context, &batch, NULL));
    pilotfish_gate gate;
    CHECK(pilotfish_context_n_gates(guard, 0) == 1);
    OK(pilotfish_context_gate(guard, 0, 0, &gate));
    CHECK(gate.fired);
    llama_memory_clear(llama_get_memory(context), true);

    /* One batch after another. */
    pilotfish_end end;
    fill(&batch, PROMPT, N_TOKENS, 0, 0);
    FAILS(pilotfish_context_end(guard, 0), OUT_OF_ORDER, "none has begun");
    FAILS(pilotfish_context_begin(guard, NULL, &batch), INVALID_ARGUMENT, "`llama` is null");
    FAILS(pilotfish_context_begin(guard, context, NULL), INVALID_ARGUMENT, "`batch` is null");
    FAILS(pilotfish_context_begin(guard, alone, &batch), INVALID_ARGUMENT, "another");
    pilotfish_context * unattached;
    OK(pilotfish_context_new(guards, model, &unattached));
    FAILS(pilotfish_context_decode(unattached, alone, &batch, NULL), INVALID_ARGUMENT, "PILOTFISH_ATTACH");
    pilotfish_context_free(unattached);
    OK(pilotfish_context_begin(guard, context, &batch));
    FAILS(pilotfish_context_begin(guard, context, &batch), OUT_OF_ORDER, "has not ended");
    FAILS(pilotfish_context_gate(guard, 0, 0, &gate), OUT_OF_ORDER, "pilotfish_context_end");
    CHECK(llama_decode(context, batch) == 0);
    OK(pilotfish_context_end(guard, 0));
    OK(pilotfish_context_gate(guard, 0, 0, &gate));
    CHECK(gate.decided && gate.has_score && strlen(gate.guard) > 0 && strcmp(gate.gate, "sharks") == 0 && gate.fired);
    FAILS(pilotfish_context_gate(guard, 0, 1, &gate), NOT_FOUND, "number 1");
    FAILS(pilotfish_context_gate(guard, 1, 0, &gate), NOT_FOUND, "sequence 1");
    OK(pilotfish_context_ended(guard, 0, &end));
    CHECK(end.reason == PILOTFISH_END_REASON_NONE && end.message[0] == 0);
    const double score = gate.score;

    /* What llama.cpp refuses is told, and changes nothing. */
    fill(&batch, PROMPT, 1, N_TOKENS + 5, 0);
    int32_t result = 0;
    FAILS(pilotfish_context_decode(guard, context, &batch, &result), DECODE_FAILED, "llama_decode");
    CHECK(result != 0);

    /* Each sequence is for itself, and a copy is what it is a copy of. */
    fill(&batch, PROMPT, N_TOKENS, 0, 1);
    OK(pilotfish_context_decode(guard, context, &batch, &result));
    CHECK(result == 0);
    OK(pilotfish_context_gate(guard, 1, 0, &gate));
    CHECK(gate.score == score);
    OK(pilotfish_context_copy_cells(guard, 1, 2, -1, -1));
    CHECK(llama_memory_seq_pos_max(llama_get_memory(context), 2) == N_TOKENS - 1);
    OK(pilotfish_context_gate(guard, 2, 0, &gate));
    CHECK(gate.score == score);
    OK(pilotfish_context_copy_cells(guard, 2, 2, -1, -1));
    OK(pilotfish_context_gate(guard, 2, 0, &gate));
    CHECK(gate.score == score);
    FAILS(pilotfish_context_copy_cells(guard, 1, 4, -1, -1), INVALID_ARGUMENT, "sequence 4");
    FAILS(pilotfish_context_shift_cells(guard, -1, 0, -1, 1), INVALID_ARGUMENT, "sequence -1");

    /* A sequence that the context has not ends nothing but the call. */
    fill(&batch, PROMPT, 1, 0, 4);
    FAILS(pilotfish_context_decode(guard, context, &batch, NULL), INVALID_ARGUMENT, "sequence 4");
    fill(&batch, PROMPT, 1, 0, -1);
    FAILS(pilotfish_context_decode(guard, context, &batch, NULL), INVALID_ARGUMENT, "sequence -1");

    /* A turn that llama.cpp refuses has not been: what the gates had decided stands, and the turn is read when it comes. */
    fill(&batch, PROMPT, N_TOKENS, N_TOKENS + 3, 1);
    FAILS(pilotfish_context_decode(guard, context, &batch, NULL), DECODE_FAILED, "llama_decode");
    OK(pilotfish_context_gate(guard, 1, 0, &gate));
    CHECK(gate.decided && gate.fired && gate.score == score);
    fill(&batch, PROMPT, 1, N_TOKENS, 1);
    OK(pilotfish_context_decode(guard, context, &batch, NULL));
    OK(pilotfish_context_gate(guard, 1, 0, &gate));
    CHECK(gate.decided && gate.fired && gate.score == score);

    /* Tokens that look like a draft of the answer are a prompt where the app says so. */
    fill(&batch, PROMPT, 2, N_TOKENS + 1, 1);
    batch.logits[0] = true;
    OK(pilotfish_context_begin_prompt(guard, 1));
    OK(pilotfish_context_decode(guard, context, &batch, NULL));
    OK(pilotfish_context_gate(guard, 1, 0, &gate));
    CHECK(gate.decided && gate.score != score);

    /* Rows that some sequences share, and rows of their own beside: no gate reads the whole, so all have fired. */
    llama_memory_clear(llama_get_memory(context), true);
    fill(&batch, HARMLESS, N_HARMLESS, 0, 0);
    OK(pilotfish_context_decode(guard, context, &batch, NULL));
    OK(pilotfish_context_gate(guard, 0, 0, &gate));
    CHECK(!gate.fired);
    llama_memory_clear(llama_get_memory(context), true);
    fill(&batch, HARMLESS, N_HARMLESS, 0, 0);
    for (int i = 1; i < N_HARMLESS; i++) {
        const int row = batch.n_tokens++;
        batch.token[row] = HARMLESS[i];
        batch.pos[row] = i;
        batch.n_seq_id[row] = 1;
        batch.seq_id[row][0] = 1;
        batch.logits[row] = i + 1 == N_HARMLESS;
    }
    batch.n_seq_id[0] = 2;
    batch.seq_id[0][1] = 1;
    OK(pilotfish_context_decode(guard, context, &batch, NULL));
    OK(pilotfish_context_gate(guard, 0, 0, &gate));
    CHECK(!gate.fired);
    OK(pilotfish_context_gate(guard, 1, 0, &gate));
    CHECK(gate.fired && !gate.has_score);
    /* All of a prompt for both, in parts, is one prompt. */
    llama_memory_clear(llama_get_memory(context), true);
    for (int i = 0; i < N_HARMLESS; i++) {
        fill(&batch, HARMLESS + i, 1, i, 0);
        batch.logits[0] = i + 1 == N_HARMLESS;
        batch.n_seq_id[0] = 2;
        batch.seq_id[0][1] = 1;
        OK(pilotfish_context_decode(guard, context, &batch, NULL));
    }
    OK(pilotfish_context_gate(guard, 1, 0, &gate));
    CHECK(gate.decided && !gate.fired);
    /* What was decoded unannounced between them is not taken for what was there. */
    llama_memory_clear(llama_get_memory(context), true);
    fill(&batch, HARMLESS, N_HARMLESS, 0, 0);
    CHECK(llama_decode(context, batch) == 0);
    fill(&batch, HARMLESS, 1, N_HARMLESS, 0);
    OK(pilotfish_context_decode(guard, context, &batch, NULL));
    OK(pilotfish_context_gate(guard, 0, 0, &gate));
    CHECK(gate.fired);
    /* Logits of a row that is not the batch's last end the prompt. */
    llama_memory_clear(llama_get_memory(context), true);
    fill(&batch, PROMPT, N_TOKENS, 0, 0);
    batch.logits[N_TOKENS - 1] = false;
    batch.logits[N_TOKENS - 2] = true;
    OK(pilotfish_context_decode(guard, context, &batch, NULL));
    OK(pilotfish_context_gate(guard, 0, 0, &gate));
    CHECK(gate.decided);
    /* Embeddings come with the logits of every row, asked for or not. */
    llama_memory_clear(llama_get_memory(context), true);
    fill(&batch, HARMLESS, N_HARMLESS, 0, 0);
    batch.logits[N_HARMLESS - 1] = false;
    llama_set_embeddings(context, true);
    OK(pilotfish_context_decode(guard, context, &batch, NULL));
    llama_set_embeddings(context, false);
    OK(pilotfish_context_gate(guard, 0, 0, &gate));
    CHECK(gate.fired);
    llama_memory_clear(llama_get_memory(context), true);

    /* Interventions are set between two tokens, for one sequence: off is as alone, on is not. */
    struct { const char * setting; bool same; } settings[] = { { "off", true }, { "40", false }, { "off", true } };
    fill(&batch, PROMPT, N_TOKENS, 0, 0);
    OK(pilotfish_guards_set(guards, "shark-gate", "shark", "off"));
    FAILS(pilotfish_context_set(guard, 1, "no-such", "on"), NOT_FOUND, "no-such");
    FAILS(pilotfish_context_set(guard, 1, "shark", "maybe"), REFUSED, "maybe");
    FAILS(pilotfish_context_set(guard, 3, "shark", "on"), NOT_FOUND, "sequence 3");
    for (int i = 0; i < 3; i++) {
        llama_memory_clear(llama_get_memory(alone), true);
        llama_memory_clear(llama_get_memory(context), true);
        CHECK(llama_decode(alone, batch) == 0);
        OK(pilotfish_context_decode(guard, context, &batch, NULL));
        OK(pilotfish_context_set(guard, 0, "shark", settings[i].setting));
        llama_token next = PROMPT[0];
        struct llama_batch one = llama_batch_get_one(&next, 1);
        CHECK(llama_decode(alone, one) == 0);
        OK(pilotfish_context_decode(guard, context, &one, NULL));
        const float * expected = llama_get_logits_ith(alone, -1), * found = llama_get_logits_ith(context, -1);
        CHECK((memcmp(expected, found, sizeof *expected * (size_t) n_vocab) == 0) == settings[i].same);
        CHECK(likeliest(found, n_vocab) >= 0);
    }

    OK(pilotfish_guards_set(guards, "shark-gate", "shark", NULL));

    /* The app's own callback runs too, as often as alone. */
    struct seen seen = { 0, 0, guard };
    llama_memory_clear(llama_get_memory(context), true);
    OK(pilotfish_context_set_callback(guard, look, &seen));
    OK(pilotfish_context_decode(guard, context, &batch, NULL));
    CHECK(seen.n_shown == 1 && seen.n_asked > 10);
    OK(pilotfish_context_set_callback(guard, NULL, NULL));
    llama_memory_clear(llama_get_memory(context), true);
    OK(pilotfish_context_decode(guard, context, &batch, NULL));
    CHECK(seen.n_shown == 1);

    /* Each thread has its own last error. */
    pthread_t thread;
    FAILS(pilotfish_context_end(guard, 0), OUT_OF_ORDER, "none has begun");
    CHECK(pthread_create(&thread, NULL, elsewhere, guard) == 0 && pthread_join(thread, NULL) == 0);
    CHECK(strstr(pilotfish_last_error(), "none has begun") != NULL);

    uint64_t epoch = 99;
    OK(pilotfish_guards_reload(guards, &epoch));
    CHECK(epoch == 2);

    /* Guards are changed for prompts to come, whoever answers one now. */
    struct { const char * setting; bool same; } changes[] = { { "off", true }, { "40", false }, { NULL, false } };
    FAILS(pilotfish_guards_set(guards, "no-such", "shark", "on"), NOT_FOUND, "no-such");
    FAILS(pilotfish_guards_set(guards, "shark-gate", "no-such", "on"), REFUSED, "no-such");
    FAILS(pilotfish_guards_set(guards, "shark-gate", NULL, "on"), INVALID_ARGUMENT, "`intervention` is null");
    for (int i = 0; i < 5; i++) {
        if (i < 3) {
            OK(pilotfish_guards_set(guards, "shark-gate", "shark", changes[i].setting));
        } else {
            OK(pilotfish_guards_enable(guards, "shark-gate", i == 4));
        }
        llama_memory_clear(llama_get_memory(alone), true);
        llama_memory_clear(llama_get_memory(context), true);
        for (int part = 0; part < 2; part++) {
            fill(&batch, PROMPT, part == 0 ? N_TOKENS : 1, part == 0 ? 0 : N_TOKENS, 0);
            CHECK(llama_decode(alone, batch) == 0);
            OK(pilotfish_context_decode(guard, context, &batch, NULL));
        }
        const float * expected = llama_get_logits_ith(alone, -1), * found = llama_get_logits_ith(context, -1);
        const bool same = memcmp(expected, found, sizeof *expected * (size_t) n_vocab) == 0;
        CHECK(same == (i < 3 ? changes[i].same : i == 3));
    }
    OK(pilotfish_guards_reload(guards, &epoch));
    CHECK(epoch == 7);

    says_its_message(model, argv[3], argv[6]);

    llama_batch_free(batch);
    llama_free(context);
    llama_free(alone);
    /* In any order. */
    pilotfish_guards_free(guards);
    pilotfish_context_free(guard);
    llama_model_free(model);
    printf("done\n");
    return 0;
}
