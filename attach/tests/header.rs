//! `include/pilotfish.h` says what `src/abi.rs` does. `PILOTFISH_UPDATE_HEADER=1 cargo test -p pilotfish-attach --test header` writes it anew.

use std::path::Path;

/// What cannot be said in Rust.
const HEAD: &str = "\
/* Guards in an app that runs llama.cpp. Made from attach/src/abi.rs; how to use it: docs/attach.md and examples/c.
 *
 * Threads: `pilotfish_guards` may be used by any thread, several at once. A `pilotfish_context` is for one thread at a time, as the `llama_context` that it guards:
 * a second one that comes in the midst of a call gets PILOTFISH_RESULT_BUSY; between `_begin` and `_end`, while llama.cpp decodes, that is not seen.
 * `pilotfish_last_error` is each thread's own. Callbacks and resolvers must return: no exception and no longjmp may leave them.
 *
 * Lives: the model outlives the `llama_context`, which is freed before its `pilotfish_context`, which is freed before the model. `pilotfish_guards` may be freed at any time.
 *
 * C99 or newer, C++11 or newer.
 */";

const TAIL: &str = "\
/* Has a context that is made with `params` (a `struct llama_context_params *`) guarded by `context`. */
#define PILOTFISH_ATTACH(context, params) \\
    ((params)->cb_eval = pilotfish_eval_callback, (params)->cb_eval_user_data = pilotfish_context_user_data(context))";

fn config() -> cbindgen::Config {
    let mut config = cbindgen::Config {
        language: cbindgen::Language::C,
        cpp_compat: true,
        include_guard: Some("PILOTFISH_H".into()),
        header: Some(HEAD.into()),
        trailer: Some(TAIL.into()),
        after_includes: Some(
            "\nstruct llama_model;\nstruct llama_context;\nstruct llama_batch;\nstruct ggml_tensor;".into(),
        ),
        sys_includes: ["stdbool.h", "stddef.h", "stdint.h"].map(String::from).into(),
        no_includes: true,
        usize_is_size_t: true,
        documentation_style: cbindgen::DocumentationStyle::C,
        line_length: 140,
        ..Default::default()
    };
    config.enumeration.prefix_with_name = true;
    config.enumeration.rename_variants = cbindgen::RenameRule::ScreamingSnakeCase;
    for name in ["llama_model", "llama_context", "llama_batch", "ggml_tensor"] {
        config.export.rename.insert(name.into(), format!("struct {name}"));
    }
    config
}

#[test]
fn the_header_is_that_of_the_source() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let bindings = cbindgen::Builder::new().with_src(folder.join("src/abi.rs")).with_config(config()).generate();
    let mut made = Vec::new();
    bindings.expect("src/abi.rs can be read").write(&mut made);
    let made = String::from_utf8(made).unwrap().replace("# Safety\n", "What the caller sees to:\n");
    let path = folder.join("../include/pilotfish.h");
    if std::env::var_os("PILOTFISH_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == made,
        "include/pilotfish.h is not that of src/abi.rs: run this test with PILOTFISH_UPDATE_HEADER=1, and look at what it changes"
    );
}
