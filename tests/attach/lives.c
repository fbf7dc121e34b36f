/* What lives and dies in an app, for tests/suite/attach.rs to run under valgrind: lives SCENARIO LIBRARIES MODEL GUARDS [PILOTFISH]
 *
 * llama.cpp is loaded from the folder LIBRARIES by dlopen, as apps with plugins do. Where PILOTFISH, the library, is given, the app calls it itself; else it is
 * preloaded, or nothing guards. Each scenario prints `done`. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <glob.h>
#include <llama.h>
#include <pilotfish.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define FUNCTIONS(F) \
    F(llama_backend_init) F(llama_model_default_params) F(llama_model_load_from_file) F(llama_model_free) F(llama_context_default_params) \
    F(llama_init_from_model) F(llama_free) F(llama_decode) F(llama_batch_get_one) F(llama_get_logits_ith) F(llama_log_set) \
    F(llama_get_memory) F(llama_memory_clear)
#define OF_PILOTFISH(F) \
    F(pilotfish_guards_open) F(pilotfish_guards_free) F(pilotfish_guards_reload) F(pilotfish_context_new) F(pilotfish_context_free) F(pilotfish_context_decode) \
    F(pilotfish_eval_callback) F(pilotfish_context_user_data) F(pilotfish_last_error)
#define DECLARE(name) static __typeof__(name) * p_##name;
#define LOOK_UP(name) p_##name = (__typeof__(p_##name)) sym(handle, #name);
FUNCTIONS(DECLARE)
OF_PILOTFISH(DECLARE)

static void fail(const char * what) {
    fprintf(stderr, "%s: %s\n", what, p_pilotfish_last_error ? p_pilotfish_last_error() : "");
    exit(3);
}

static void * sym(void * handle, const char * name) {
    void * found = dlsym(handle, name);
    if (!found) {
        fail(name);
    }
    return found;
}

static void quiet(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static const char * libraries, * model_path, * guards_path, * pilotfish_path;
static void * llama_handle, * pilotfish_handle;

static void load_llama(void) {
    char pattern[4096];
    glob_t found;
    snprintf(pattern, sizeof pattern, "%s/libllama.*so", libraries);
    if (glob(pattern, 0, NULL, &found) != 0) {
        fail(pattern);
    }
    void * handle = llama_handle = dlopen(found.gl_pathv[0], RTLD_NOW | RTLD_LOCAL);
    globfree(&found);
    if (!handle) {
        fail(dlerror());
    }
    FUNCTIONS(LOOK_UP)
    p_llama_log_set(quiet, NULL);
    void (* load_backends)(const char *) = (void (*)(const char *)) sym(handle, "ggml_backend_load_all_from_path");
    load_backends(libraries);
    p_llama_backend_init();
}

static void load_pilotfish(void) {
    if (!pilotfish_path) {
        return;
    }
    void * handle = pilotfish_handle = dlopen(pilotfish_path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        fail(dlerror());
    }
    OF_PILOTFISH(LOOK_UP)
}

static pilotfish_guards * open_guards(void) {
    pilotfish_guards * guards = NULL;
    if (pilotfish_path && p_pilotfish_guards_open(guards_path, &guards)) {
        fail("open");
    }
    return guards;
}

struct guarded {
    struct llama_context * context;
    pilotfish_context * guard;
};

static struct guarded make(const pilotfish_guards * guards, struct llama_model * model) {
    struct guarded made = { NULL, NULL };
    struct llama_context_params params = p_llama_context_default_params();
    params.n_ctx = 256;
    params.n_seq_max = 2;
    params.n_threads = params.n_threads_batch = 1;
    if (guards) {
        if (p_pilotfish_context_new(guards, model, &made.guard)) {
            fail("context");
        }
        params.cb_eval = p_pilotfish_eval_callback;
        params.cb_eval_user_data = p_pilotfish_context_user_data(made.guard);
    }
    made.context = p_llama_init_from_model(model, params);
    if (!made.context) {
        fail("no context");
    }
    return made;
}

static struct llama_model * load(void) {
    struct llama_model * model = p_llama_model_load_from_file(model_path, p_llama_model_default_params());
    if (!model) {
        fail(model_path);
    }
    return model;
}

/* A prompt of some tokens and two more. */
static void answer(struct guarded guarded) {
    llama_token tokens[] = { 1, 4, 3, 5, 4, 3 };
    p_llama_memory_clear(p_llama_get_memory(guarded.context), true);
    for (int n = 6, i = 0; i < 3; i++, n = 1) {
        struct llama_batch batch = p_llama_batch_get_one(tokens, n);
        if (guarded.guard ? p_pilotfish_context_decode(guarded.guard, guarded.context, &batch, NULL) != 0 : p_llama_decode(guarded.context, batch) != 0) {
            fail("decode");
        }
        const float * logits = p_llama_get_logits_ith(guarded.context, -1);
        if (logits[0] != logits[0]) {
            fail("no number");
        }
    }
}

static void drop(struct guarded guarded) {
    p_llama_free(guarded.context);
    if (guarded.guard) {
        p_pilotfish_context_free(guarded.guard);
    }
}

/* Several models, freed in another order than they came. */
static void models(void) {
    pilotfish_guards * guards = open_guards();
    struct llama_model * first = load(), * second = load();
    struct guarded a = make(guards, first), b = make(guards, second), c = make(guards, first);
    answer(a);
    answer(b);
    answer(c);
    drop(a);
    answer(c);
    drop(c);
    p_llama_model_free(first);
    answer(b);
    /* Another where the first lay, perhaps. */
    struct llama_model * third = load();
    struct guarded d = make(guards, third);
    if (guards) {
        p_pilotfish_guards_free(guards);
    }
    answer(d);
    answer(b);
    drop(b);
    p_llama_model_free(second);
    drop(d);
    p_llama_model_free(third);
}

static atomic_bool over;
static pilotfish_guards * reloaded;

/* Touches a guard's file, and reloads. */
static void * reload(void * data) {
    (void) data;
    char path[4096], text[65536], other[4200];
    snprintf(path, sizeof path, "%s/guard/guard.toml", guards_path);
    snprintf(other, sizeof other, "%s.new", path);
    FILE * file = fopen(path, "r");
    if (!file) {
        fail(path);
    }
    const size_t length = fread(text, 1, sizeof text, file);
    fclose(file);
    for (int i = 0; !over; i++) {
        file = fopen(other, "w");
        if (!file || fwrite(text, 1, length, file) != length || fprintf(file, "\n# %d\n", i) < 0 || fclose(file) || rename(other, path)) {
            fail(other);
        }
        if (reloaded && p_pilotfish_guards_reload(reloaded, NULL)) {
            fail("reload");
        }
        usleep(reloaded ? 1000 : 20000);
    }
    return NULL;
}

/* Contexts come and go while guards are reloaded. */
static void reloads(void) {
    reloaded = open_guards();
    struct llama_model * model = load();
    pthread_t thread;
    if (pthread_create(&thread, NULL, reload, NULL)) {
        fail("thread");
    }
    for (int i = 0; i < 12; i++) {
        struct guarded guarded = make(reloaded, model);
        answer(guarded);
        drop(guarded);
    }
    over = true;
    pthread_join(thread, NULL);
    if (reloaded) {
        p_pilotfish_guards_free(reloaded);
    }
    p_llama_model_free(model);
}

/* A child that runs a program, and one that does nothing, while a context lives. */
static void forks(char ** argv) {
    pilotfish_guards * guards = open_guards();
    struct llama_model * model = load();
    struct guarded guarded = make(guards, model);
    answer(guarded);
    for (int i = 0; i < 2; i++) {
        const pid_t child = fork();
        if (child == 0) {
            if (i == 0) {
                _exit(0);
            }
            argv[1] = "models";
            execv(argv[0], argv);
            _exit(4);
        }
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
            fail("child");
        }
        answer(guarded);
    }
    drop(guarded);
    if (guards) {
        p_pilotfish_guards_free(guards);
    }
    p_llama_model_free(model);
}

/* All is loaded, used and unloaded, again and again. */
static void unloads(void) {
    for (int i = 0; i < 3; i++) {
        if (i > 0) {
            load_llama();
            load_pilotfish();
        }
        pilotfish_guards * guards = open_guards();
        struct llama_model * model = load();
        struct guarded guarded = make(guards, model);
        answer(guarded);
        drop(guarded);
        if (guards) {
            p_pilotfish_guards_free(guards);
        }
        p_llama_model_free(model);
        if (pilotfish_handle && dlclose(pilotfish_handle)) {
            fail("dlclose");
        }
        if (dlclose(llama_handle)) {
            fail("dlclose");
        }
    }
}

int main(int argc, char ** argv) {
    if (argc < 5) {
        return 64;
    }
    libraries = argv[2];
    model_path = argv[3];
    guards_path = argv[4];
    pilotfish_path = argc > 5 ? argv[5] : NULL;
    load_llama();
    load_pilotfish();
    if (strcmp(argv[1], "models") == 0) {
        models();
    } else if (strcmp(argv[1], "reloads") == 0) {
        reloads();
    } else if (strcmp(argv[1], "forks") == 0) {
        forks(argv);
    } else if (strcmp(argv[1], "unloads") == 0) {
        unloads();
    } else {
        return 64;
    }
    printf("done\n");
    return 0;
}
