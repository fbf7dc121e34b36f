//! llama.cpp by its own C API, with none of Pilotfish's code: what the hook, the readers and imported control vectors are held
//! against.

use llama_cpp_sys_2 as sys;
use std::ffi::{CStr, CString, c_void};
use std::path::Path;

/// What one decode of a prompt gave.
pub struct Decoded {
    /// `l_out-LAYER`, `[n_tokens][n_embd]`.
    pub residual: Vec<Vec<f32>>,
    /// Of the last token, `[n_vocab]`.
    pub logits: Vec<f32>,
}

/// llama.cpp's own way of adding directions: one of `n_embd` values for every layer from 1 on, row by row.
pub struct ControlVector<'a> {
    pub data: &'a [f32],
    pub layers: std::ops::RangeInclusive<i32>,
}

struct Wanted {
    name: CString,
    values: Vec<f32>,
}

/// Runs `tokens` and reads the residual after block `layer`, which is not the model's last.
pub fn decode(model: &Path, tokens: &[i32], layer: u32, control_vector: Option<ControlVector<'_>>) -> Decoded {
    let path = CString::new(model.to_str().unwrap()).unwrap();
    let mut wanted = Wanted { name: CString::new(format!("l_out-{layer}")).unwrap(), values: Vec::new() };
    let mut tokens = tokens.to_vec();
    // SAFETY: plain use of llama.h. Everything is freed in the end, `wanted` and `tokens` outlive the context, and the callback is
    // given a pointer to `wanted`, which nothing else uses during the decode.
    unsafe {
        sys::llama_backend_init();
        let mut model_params = sys::llama_model_default_params();
        model_params.n_gpu_layers = 0;
        let model = sys::llama_model_load_from_file(path.as_ptr(), model_params);
        assert!(!model.is_null(), "llama.cpp loads {path:?}");
        let mut params = sys::llama_context_default_params();
        params.n_ctx = 512;
        params.cb_eval = Some(read_residual);
        params.cb_eval_user_data = (&raw mut wanted).cast();
        let context = sys::llama_init_from_model(model, params);
        assert!(!context.is_null(), "llama.cpp makes a context");
        let width = sys::llama_model_n_embd(model);
        if let Some(ControlVector { data, layers }) = control_vector {
            let status =
                sys::llama_set_adapter_cvec(context, data.as_ptr(), data.len(), width, *layers.start(), *layers.end());
            assert_eq!(status, 0);
        }
        let batch = sys::llama_batch_get_one(tokens.as_mut_ptr(), tokens.len() as i32);
        assert_eq!(sys::llama_decode(context, batch), 0);
        let n_vocab = sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(model)) as usize;
        let logits = std::slice::from_raw_parts(sys::llama_get_logits_ith(context, -1), n_vocab).to_vec();
        sys::llama_free(context);
        sys::llama_model_free(model);
        let residual = wanted.values.chunks_exact(width as usize).map(<[f32]>::to_vec).collect();
        Decoded { residual, logits }
    }
}

unsafe extern "C" fn read_residual(tensor: *mut sys::ggml_tensor, ask: bool, user_data: *mut c_void) -> bool {
    // SAFETY: llama.cpp shows a live tensor, and `user_data` is the `Wanted` of `decode`.
    unsafe {
        let wanted = &mut *user_data.cast::<Wanted>();
        let is_it = CStr::from_ptr(sys::ggml_get_name(tensor)) == wanted.name.as_c_str();
        if !ask && is_it {
            wanted.values.resize(sys::ggml_nelements(tensor) as usize, 0.0);
            let size = sys::ggml_nbytes(tensor);
            assert_eq!(size, size_of_val(wanted.values.as_slice()));
            sys::ggml_backend_tensor_get(tensor, wanted.values.as_mut_ptr().cast(), 0, size);
        }
        !ask || is_it
    }
}

macro_rules! symbols {
    ($($symbol:ident)*) => {
        /// The address of a function of ggml that this binary links, or null.
        pub fn linked_symbol(name: &CStr) -> *const c_void {
            match name.to_str() {
                $(Ok(stringify!($symbol)) => sys::$symbol as *const c_void,)*
                _ => std::ptr::null(),
            }
        }
    };
}

symbols! {
    ggml_get_name
    ggml_op_desc
    ggml_nelements
    ggml_nrows
    ggml_nbytes
    ggml_is_contiguous
    ggml_backend_tensor_get
    ggml_backend_tensor_set
    ggml_init
    ggml_free
    ggml_tensor_overhead
    ggml_graph_overhead_custom
    ggml_new_graph_custom
    ggml_build_forward_expand
    ggml_graph_n_nodes
    ggml_graph_node
    ggml_new_tensor_2d
    ggml_view_2d
    ggml_set_output
    ggml_get_data
    ggml_add
    ggml_add_inplace
    ggml_sub
    ggml_mul
    ggml_div
    ggml_repeat
    ggml_mul_mat
    ggml_mul_mat_set_prec
    ggml_concat
    ggml_sum_rows
    ggml_sqr
    ggml_sqrt
    ggml_abs
    ggml_relu
    ggml_step
    ggml_scale_bias
    ggml_clamp
    ggml_backend_alloc_ctx_tensors
    ggml_backend_tensor_alloc
    ggml_backend_buffer_free
    ggml_backend_buffer_get_base
    ggml_backend_buffer_is_host
    ggml_backend_buffer_get_type
    ggml_backend_buft_get_device
    ggml_backend_buft_alloc_buffer
    ggml_backend_dev_by_type
    ggml_backend_dev_type
    ggml_backend_dev_buffer_type
    ggml_backend_dev_init
    ggml_backend_free
    ggml_backend_get_default_buffer_type
    ggml_backend_get_max_size
    ggml_backend_supports_op
    ggml_backend_supports_buft
    ggml_backend_graph_compute
    ggml_gallocr_new
    ggml_gallocr_free
    ggml_gallocr_alloc_graph
    ggml_gallocr_get_buffer_size
}
