/* A guarded model in an app of one's own, in C: guarded MODEL.gguf GUARDS "a prompt"
 *
 * What is Pilotfish's has a comment; the rest is what any app of llama.cpp does. How to build it: docs/attach.md. */

#include <llama.h>
#include <pilotfish.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failed(const char * what) {
    fprintf(stderr, "%s: %s\n", what, pilotfish_last_error());
    return 2;
}

static void quiet(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

/* The tokens of a user's turn, by the model's chat template. */
static int tokens_of(const struct llama_model * model, const char * prompt, llama_token * tokens, int room) {
    const char * template = llama_model_chat_template(model, NULL);
    const struct llama_chat_message turn = { "user", prompt };
    const int n_text = (int) strlen(prompt) + 4096;
    char * text = malloc((size_t) n_text);
    int length = template ? llama_chat_apply_template(template, &turn, 1, true, text, n_text) : -1;
    if (length < 0) {
        length = snprintf(text, (size_t) n_text, "Instruction: %s\nResponse:", prompt);
    }
    const int n = llama_tokenize(llama_model_get_vocab(model), text, length, tokens, room, true, true);
    free(text);
    return n;
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL.gguf GUARDS PROMPT\n", argv[0]);
        return 64;
    }
    llama_log_set(quiet, NULL);
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        fprintf(stderr, "%s is no model\n", argv[1]);
        return 2;
    }

    /* The guards of a directory, and what guards one context with them. */
    pilotfish_guards * guards;
    pilotfish_context * guard;
    if (pilotfish_guards_open(argv[2], &guards) || pilotfish_context_new(guards, model, &guard)) {
        return failed(argv[2]);
    }
    struct llama_context_params params = llama_context_default_params();
    PILOTFISH_ATTACH(guard, &params);
    struct llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        fprintf(stderr, "no context could be made\n");
        return 2;
    }

    llama_token tokens[512];
    const int n = tokens_of(model, argv[3], tokens, 512);
    if (n < 0) {
        fprintf(stderr, "the prompt has more than 512 tokens\n");
        return 2;
    }
    struct llama_sampler * sampler = llama_sampler_init_greedy();
    struct llama_batch batch = llama_batch_get_one(tokens, n);
    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    for (int i = 0; i < 48; i++) {
        /* In the place of llama_decode. Where a guard blocks, what is sampled then is the guard's message. */
        if (pilotfish_context_decode(guard, context, &batch, NULL)) {
            return failed("decoding");
        }
        llama_token token = llama_sampler_sample(sampler, context, -1);
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        char piece[128];
        const int length = llama_token_to_piece(vocab, token, piece, sizeof piece, 0, false);
        fwrite(piece, 1, length > 0 ? (size_t) length : 0, stdout);
        tokens[0] = token;
        batch = llama_batch_get_one(tokens, 1);
    }
    printf("\n");

    /* What the gates have decided of the prompt, and whether one of them has ended the answer. */
    for (size_t i = 0; i < pilotfish_context_n_gates(guard, 0); i++) {
        pilotfish_gate gate;
        if (pilotfish_context_gate(guard, 0, i, &gate)) {
            return failed("a gate");
        }
        fprintf(stderr, "%s/%s: ", gate.guard, gate.gate);
        /* Where it can't be told what a gate has read it has fired, and has no score. */
        if (gate.has_score) {
            fprintf(stderr, "score %.4f%s\n", gate.score, gate.fired ? ", fired" : "");
        } else {
            fprintf(stderr, "%s\n", gate.fired ? "fired" : "undecided");
        }
    }
    pilotfish_end end;
    if (pilotfish_context_ended(guard, 0, &end)) {
        return failed("the end");
    }
    if (end.reason) {
        fprintf(stderr, "%s has ended the answer: %s\n", end.guard, end.message);
    }

    llama_sampler_free(sampler);
    llama_free(context);
    pilotfish_context_free(guard);
    pilotfish_guards_free(guards);
    llama_model_free(model);
    return end.reason ? 1 : 0;
}
