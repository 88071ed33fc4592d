//! NVRTC, opened where the wheels of PyPI or a toolkit put it.

use libloading::{Library, Symbol};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// Names the folder that holds NVRTC's `lib` and the toolkit's `include`.
pub const VARIABLE: &str = "LABPIPE_NVRTC";

type Program = *mut c_void;

/// The library, and what kernels include.
pub struct Nvrtc {
    library: Library,
    _builtins: Library,
    include: PathBuf,
    /// As 13.0.
    pub version: String,
}

/// Why a source was not compiled.
#[derive(Debug, thiserror::Error)]
pub enum NvrtcError {
    #[error("open NVRTC: {0}")]
    Open(#[from] libloading::Error),
    #[error("find {name} in {folder}")]
    Missing { name: &'static str, folder: PathBuf },
    #[error("NVRTC's {call} returned {code}: {log}")]
    Call { call: &'static str, code: c_int, log: String },
}

/// What the compiler made of a source.
pub struct Compiled {
    /// An ELF file for one architecture.
    pub cubin: Vec<u8>,
    /// What the assembler says of each kernel.
    pub log: String,
}

/// Looks up `$name` as a function of these arguments and calls it; anything but 0 is an error.
macro_rules! call {
    ($library:expr, $program:expr, $name:ident($($value:expr => $type:ty),* $(,)?)) => {{
        // SAFETY: the signature is that of nvrtc.h, and every pointer outlives the call.
        let code = unsafe {
            let function: Symbol<'_, unsafe extern "C" fn($($type),*) -> c_int> =
                $library.get(concat!(stringify!($name), "\0").as_bytes())?;
            function($($value),*)
        };
        match code {
            0 => Ok(()),
            code => Err(NvrtcError::Call { call: stringify!($name), code, log: log($library, $program).unwrap_or_default() }),
        }
    }};
}

impl Nvrtc {
    /// Opens the library below `folder`.
    ///
    /// # Errors
    /// `Missing`, `Open`, `Call`.
    pub fn open(folder: &Path) -> Result<Nvrtc, NvrtcError> {
        // NVRTC looks its own second library up by name: it is found where one of that name is open already.
        let builtins = open_library(folder, "libnvrtc-builtins.so")?;
        let library = open_library(folder, "libnvrtc.so")?;
        let (mut major, mut minor) = (0, 0);
        call!(&library, std::ptr::null_mut(), nvrtcVersion(&mut major => *mut c_int, &mut minor => *mut c_int))?;
        Ok(Nvrtc { library, _builtins: builtins, include: folder.join("include"), version: format!("{major}.{minor}") })
    }

    /// Compiles CUDA C++ for one architecture (`sm_90a`), with the options that cubecl-cuda 0.11.3 gives (src/compute/context.rs).
    ///
    /// # Errors
    /// `Call`, with the compiler's messages.
    pub fn compile(&self, source: &str, architecture: &str) -> Result<Compiled, NvrtcError> {
        let Nvrtc { library, .. } = self;
        let source = CString::new(source).expect("a source without NUL");
        let mut program: Program = std::ptr::null_mut();
        call!(library, program, nvrtcCreateProgram(
            &mut program => *mut Program,
            source.as_ptr() => *const c_char,
            std::ptr::null() => *const c_char,
            0 => c_int,
            std::ptr::null() => *const *const c_char,
            std::ptr::null() => *const *const c_char,
        ))?;
        let compiled = self.compile_program(program, architecture);
        call!(library, program, nvrtcDestroyProgram(&mut program => *mut Program))?;
        compiled
    }

    fn compile_program(&self, program: Program, architecture: &str) -> Result<Compiled, NvrtcError> {
        let Nvrtc { library, .. } = self;
        let options = [
            format!("--gpu-architecture={architecture}"),
            format!("--include-path={}", self.include.display()),
            format!("--include-path={}", self.include.join("cccl").display()),
            "-lineinfo".to_owned(),
            "--ptxas-options=--verbose".to_owned(),
        ];
        let options = options.map(|option| CString::new(option).expect("an option without NUL"));
        let pointers = options.each_ref().map(|option| option.as_ptr());
        call!(library, program, nvrtcCompileProgram(
            program => Program,
            pointers.len() as c_int => c_int,
            pointers.as_ptr() => *const *const c_char,
        ))?;
        let mut n_bytes = 0;
        call!(library, program, nvrtcGetCUBINSize(program => Program, &mut n_bytes => *mut usize))?;
        let mut cubin = vec![0u8; n_bytes];
        call!(library, program, nvrtcGetCUBIN(program => Program, cubin.as_mut_ptr().cast() => *mut c_char))?;
        Ok(Compiled { cubin, log: log(library, program)? })
    }
}

/// Opens the library of `folder/lib` whose file name begins with `name`: a version follows.
fn open_library(folder: &Path, name: &'static str) -> Result<Library, NvrtcError> {
    let folder = folder.join("lib");
    let is_it = |path: &PathBuf| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name));
    let path = std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()).find(is_it);
    // SAFETY: NVIDIA's compiler runs nothing when it is loaded.
    Ok(unsafe { Library::new(path.ok_or(NvrtcError::Missing { name, folder })?)? })
}

fn log(library: &Library, program: Program) -> Result<String, NvrtcError> {
    if program.is_null() {
        return Ok(String::new());
    }
    let null = std::ptr::null_mut();
    let mut n_bytes = 0;
    call!(library, null, nvrtcGetProgramLogSize(program => Program, &mut n_bytes => *mut usize))?;
    let mut bytes = vec![0u8; n_bytes + 1];
    call!(library, null, nvrtcGetProgramLog(program => Program, bytes.as_mut_ptr().cast() => *mut c_char))?;
    Ok(CStr::from_bytes_until_nul(&bytes).map(|log| log.to_string_lossy().into_owned()).unwrap_or_default())
}
