//! Apps that look llama.cpp's functions up by name: Python's ctypes, and whatever loads `libllama` as a plugin. The dynamic linker gives them the functions of
//! the library that they name, past anything that is preloaded, so `dlsym` itself is stood in for: those functions whose place is taken here it gives as ours.
//!
//! `dlsym` with `RTLD_NEXT` goes by who calls it, so the real one must be entered with the caller's own return address: hence the assembly.

use crate::{loaded, preload};
use pilotfish::attach::GUARDS;
use std::ffi::{CStr, c_char, c_void};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicPtr, Ordering};

type Dlsym = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;

/// The real `dlsym`, once something has been looked up.
static REAL: AtomicPtr<c_void> = AtomicPtr::new(null_mut());

unsafe extern "C" {
    fn dlvsym(handle: *mut c_void, symbol: *const c_char, version: *const c_char) -> *mut c_void;
}

/// The C library's `dlsym`.
pub fn real() -> Dlsym {
    let mut address = REAL.load(Ordering::Relaxed);
    if address.is_null() {
        // As glibc calls it since 2.34, and before on each architecture.
        let versions = [c"GLIBC_2.34", c"GLIBC_2.2.5", c"GLIBC_2.17"];
        // SAFETY: strings end in NULs; the next object that has it is the C library.
        let find = |version: &CStr| unsafe { dlvsym(libc::RTLD_NEXT, c"dlsym".as_ptr(), version.as_ptr()) };
        address = versions.into_iter().map(find).find(|address| !address.is_null()).unwrap_or(null_mut());
        if address.is_null() {
            // There is no way on: the caller asked for a function, and there is none to ask.
            std::process::abort();
        }
        REAL.store(address, Ordering::Relaxed);
    }
    // SAFETY: it is the function of that name, whose C signature this is.
    unsafe { std::mem::transmute::<*mut c_void, Dlsym>(address) }
}

/// What is given in place of the function `name` that `handle` has; null where that is the function itself.
unsafe extern "C" fn replacement(handle: *mut c_void, name: *const c_char) -> *const c_void {
    let real = real();
    if name.is_null() {
        return null();
    }
    // SAFETY: the caller of `dlsym` gives a string with its NUL.
    let wanted = unsafe { CStr::from_ptr(name) };
    // Every lookup of the process comes by here.
    if !wanted.to_bytes().starts_with(b"llama_") {
        return null();
    }
    let Some(own) = preload::taken(wanted) else { return null() };
    if std::env::var_os(GUARDS).is_none() {
        return null();
    }
    // SAFETY: as the caller of `dlsym` has it.
    let found = unsafe { real(handle, name) };
    if found.is_null() || loaded::is_own(found) { null() } else { own }
}

/// The C library's function of this name, but for functions whose place is taken here.
///
/// # Safety
/// As of the C library's.
#[cfg(target_arch = "x86_64")]
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void {
    core::arch::naked_asm!(
        // Both arguments are kept, and the stack aligned.
        "push rdi",
        "push rsi",
        "sub rsp, 8",
        "call {replacement}",
        "add rsp, 8",
        "pop rsi",
        "pop rdi",
        "test rax, rax",
        "jne 2f",
        "jmp qword ptr [rip + {real}]",
        "2:",
        "ret",
        replacement = sym replacement,
        real = sym REAL,
    )
}

/// The C library's function of this name, but for functions whose place is taken here.
///
/// # Safety
/// As of the C library's.
#[cfg(target_arch = "aarch64")]
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void {
    core::arch::naked_asm!(
        "stp x29, x30, [sp, #-16]!",
        "stp x0, x1, [sp, #-16]!",
        "bl {replacement}",
        "mov x2, x0",
        "ldp x0, x1, [sp], #16",
        "ldp x29, x30, [sp], #16",
        "cbnz x2, 2f",
        "adrp x16, {real}",
        "ldr x16, [x16, :lo12:{real}]",
        "br x16",
        "2:",
        "mov x0, x2",
        "ret",
        replacement = sym replacement,
        real = sym REAL,
    )
}
