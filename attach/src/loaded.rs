//! Finds functions in what the process has loaded.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::null;

/// The address of `symbol` in any loaded object but this one, or null. The object stays loaded from then on, whatever the app does.
///
/// What the dynamic linker would take next comes first, then every loaded object by itself: an app may have loaded llama.cpp with `RTLD_LOCAL`, which keeps its
/// symbols from everybody else.
pub fn find(symbol: &CStr) -> *const c_void {
    let found = find_first(symbol);
    if !found.is_null() {
        keep(found);
    }
    found
}

/// In how many loaded objects but this one `symbol` is: more than one copy of llama.cpp can't be told apart by the names of its functions.
pub fn copies(symbol: &CStr) -> usize {
    let found = objects().into_iter().map(|path| find_in(&path, symbol)).chain([find_first(symbol)]);
    found.filter(|address| !address.is_null()).collect::<BTreeSet<_>>().len()
}

/// Keeps the object that `address` lies in from being unloaded.
pub fn keep(address: *const c_void) {
    let Some(info) = info(address) else { return };
    if info.dli_fname.is_null() {
        return;
    }
    // SAFETY: the name is the linker's own, and ends in a NUL. It loads nothing; a handle that is not closed is what keeps it. The app itself is not found by its
    // name, and is never unloaded.
    unsafe { libc::dlopen(info.dli_fname, libc::RTLD_NOLOAD | libc::RTLD_LAZY | libc::RTLD_NODELETE) };
}

fn find_first(symbol: &CStr) -> *const c_void {
    // SAFETY: a handle that there always is.
    let next = unsafe { dlsym(libc::RTLD_NEXT, symbol) };
    if !next.is_null() && !is_own(next) {
        return next;
    }
    // What comes before this library: an app that has llama.cpp linked in, and exports it.
    // SAFETY: a handle that there always is.
    let first = unsafe { dlsym(libc::RTLD_DEFAULT, symbol) };
    if !first.is_null() && !is_own(first) {
        return first;
    }
    objects().iter().map(|path| find_in(path, symbol)).find(|address| !address.is_null()).unwrap_or(null())
}

/// The address of `symbol` in the object at `path` or in one that it is linked with, or null.
fn find_in(path: &CStr, symbol: &CStr) -> *const c_void {
    // SAFETY: strings end in NULs. `RTLD_NOLOAD` loads nothing, and the handle only counts a reference that is given back.
    unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY);
        if handle.is_null() {
            return null();
        }
        let address = dlsym(handle, symbol);
        libc::dlclose(handle);
        if is_own(address) { null() } else { address }
    }
}

/// The C library's `dlsym`: the one that this library may have in its place gives what is not looked for here.
///
/// # Safety
/// `handle` must be one of the dynamic linker's.
unsafe fn dlsym(handle: *mut c_void, symbol: &CStr) -> *mut c_void {
    #[cfg(all(target_os = "linux", target_env = "gnu", any(target_arch = "x86_64", target_arch = "aarch64")))]
    let real = crate::lookup::real();
    #[cfg(not(all(target_os = "linux", target_env = "gnu", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    let real = libc::dlsym;
    // SAFETY: guaranteed by the caller; `symbol` ends in a NUL.
    unsafe { real(handle, symbol.as_ptr()) }
}

/// What the dynamic linker knows of `address`.
fn info(address: *const c_void) -> Option<libc::Dl_info> {
    let mut info = libc::Dl_info {
        dli_fname: null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: dladdr takes any address and fills in `info`.
    (unsafe { libc::dladdr(address, &raw mut info) } != 0).then_some(info)
}

/// The object that `address` lies in.
fn object_of(address: *const c_void) -> *const c_void {
    info(address).map_or(null(), |info| info.dli_fbase)
}

pub fn is_own(address: *const c_void) -> bool {
    object_of(address) == object_of(is_own as *const c_void)
}

/// Paths of the loaded objects, as the dynamic linker has them, in the order of loading.
fn objects() -> Vec<CString> {
    unsafe extern "C" fn take(info: *mut libc::dl_phdr_info, _size: usize, paths: *mut c_void) -> c_int {
        // SAFETY: dl_iterate_phdr gives a valid `info`, whose name ends in a NUL, and hands on the pointer to `paths` below.
        let (name, paths) = unsafe { (CStr::from_ptr((*info).dlpi_name), &mut *paths.cast::<Vec<CString>>()) };
        if !name.is_empty() {
            paths.push(name.to_owned());
        }
        0
    }
    let mut paths: Vec<CString> = Vec::new();
    // SAFETY: `take` has the signature that is asked for, and `paths` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(take), (&raw mut paths).cast()) };
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_loaded_is_found_and_what_is_not_is_not() {
        assert!(!find(c"strlen").is_null());
        assert!(find(c"llama_there_is_no_such_function").is_null());
        assert!(!objects().is_empty());
        assert_eq!((copies(c"strlen"), copies(c"llama_there_is_no_such_function")), (1, 0));
    }
}
