// A guarded model that answers several prompts at once, in C++: guarded MODEL.gguf GUARDS "a prompt" "another" …
//
// Each prompt is a sequence of its own, all in one context and one batch. What a guard decides of one is nothing to the others.

#include <llama.h>
#include <pilotfish.h>

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void check(pilotfish_result result, const char * what) {
    if (result != PILOTFISH_RESULT_OK) {
        throw std::runtime_error(std::string(what) + ": " + pilotfish_last_error());
    }
}

template <auto free> struct Free {
    template <typename T> void operator()(T * pointer) const { free(pointer); }
};
using Model = std::unique_ptr<llama_model, Free<llama_model_free>>;
using Context = std::unique_ptr<llama_context, Free<llama_free>>;
using Sampler = std::unique_ptr<llama_sampler, Free<llama_sampler_free>>;
using Guards = std::unique_ptr<pilotfish_guards, Free<pilotfish_guards_free>>;
using Guard = std::unique_ptr<pilotfish_context, Free<pilotfish_context_free>>;

std::vector<llama_token> tokens_of(const llama_model * model, const std::string & prompt) {
    const llama_chat_message turn = { "user", prompt.c_str() };
    std::string text(prompt.size() + 4096, '\0');
    const char * chat = llama_model_chat_template(model, nullptr);
    const int length = chat ? llama_chat_apply_template(chat, &turn, 1, true, text.data(), int(text.size())) : -1;
    text = length < 0 ? "Instruction: " + prompt + "\nResponse:" : text.substr(0, size_t(length));
    std::vector<llama_token> tokens(text.size() + 2);
    const int n = llama_tokenize(llama_model_get_vocab(model), text.data(), int(text.size()), tokens.data(), int(tokens.size()), true, true);
    tokens.resize(size_t(n < 0 ? 0 : n));
    return tokens;
}

struct Answer {
    std::vector<llama_token> next;  // what is to be decoded
    int position = 0;
    int row = -1;  // whose logits predict its next token
    std::string text;
    bool over = false;
};

int run(int argc, char ** argv) {
    const int n_prompts = argc - 3;
    Model model(llama_model_load_from_file(argv[1], llama_model_default_params()));
    if (!model) {
        throw std::runtime_error(std::string(argv[1]) + " is no model");
    }

    pilotfish_guards * opened = nullptr;
    check(pilotfish_guards_open(argv[2], &opened), argv[2]);
    const Guards guards(opened);
    pilotfish_context * made = nullptr;
    check(pilotfish_context_new(guards.get(), model.get(), &made), argv[2]);
    // Before the context, so that it is destroyed behind it.
    const Guard guard(made);

    llama_context_params params = llama_context_default_params();
    params.n_ctx = 512 * unsigned(n_prompts);
    params.n_seq_max = unsigned(n_prompts);
    PILOTFISH_ATTACH(guard.get(), &params);
    const Context context(llama_init_from_model(model.get(), params));
    if (!context) {
        throw std::runtime_error("no context could be made");
    }

    std::vector<Answer> answers(static_cast<size_t>(n_prompts));
    int room = n_prompts;
    for (int i = 0; i < n_prompts; i++) {
        answers[size_t(i)].next = tokens_of(model.get(), argv[3 + i]);
        room += int(answers[size_t(i)].next.size());
    }
    const Sampler sampler(llama_sampler_init_greedy());
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    llama_batch batch = llama_batch_init(room, 0, 1);
    for (int round = 0; round < 48; round++) {
        batch.n_tokens = 0;
        for (int sequence = 0; sequence < n_prompts; sequence++) {
            Answer & answer = answers[size_t(sequence)];
            for (size_t i = 0; i < answer.next.size(); i++) {
                const int row = batch.n_tokens++;
                batch.token[row] = answer.next[i];
                batch.pos[row] = answer.position++;
                batch.n_seq_id[row] = 1;
                batch.seq_id[row][0] = sequence;
                batch.logits[row] = i + 1 == answer.next.size();
                answer.row = row;
            }
            answer.next.clear();
        }
        if (batch.n_tokens == 0) {
            break;
        }
        // Around a decode of the app's own, as `pilotfish_context_decode` has it.
        check(pilotfish_context_begin(guard.get(), context.get(), &batch), "decoding");
        check(pilotfish_context_end(guard.get(), llama_decode(context.get(), batch)), "decoding");
        for (Answer & answer : answers) {
            if (answer.over) {
                continue;
            }
            const llama_token token = llama_sampler_sample(sampler.get(), context.get(), answer.row);
            answer.over = llama_vocab_is_eog(vocab, token);
            if (!answer.over) {
                char piece[128];
                const int length = llama_token_to_piece(vocab, token, piece, sizeof piece, 0, false);
                answer.text.append(piece, size_t(length > 0 ? length : 0));
                answer.next = { token };
            }
        }
    }
    llama_batch_free(batch);

    for (int sequence = 0; sequence < n_prompts; sequence++) {
        pilotfish_end end;
        check(pilotfish_context_ended(guard.get(), sequence, &end), "the end");
        std::printf("%d%s: %s\n", sequence, end.reason == PILOTFISH_END_REASON_NONE ? "" : " (ended)", answers[size_t(sequence)].text.c_str());
    }
    return 0;
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: %s MODEL.gguf GUARDS PROMPT …\n", argv[0]);
        return 64;
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            std::fputs(text, stderr);
        }
    }, nullptr);
    try {
        return run(argc, argv);
    } catch (const std::exception & error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
