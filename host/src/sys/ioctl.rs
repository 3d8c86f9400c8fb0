//! One ioctl with a pointer or a plain number as its argument. The typed wrappers beside this file are the only callers.

use std::ffi::c_void;
use std::os::fd::BorrowedFd;

use rustix::io;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

/// `_IO(';', number)`: VFIO and iommufd share the type and differ in the number.
const TYPE: u8 = b';';

struct Call {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: opcode and argument are what the caller of `with_pointer`, `with_value` or `with_opcode` vouches for; the calls are
// marked as mutating whether they write to user memory or not. The output is the plain return value.
unsafe impl Ioctl for Call {
    type Output = IoctlOutput;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> io::Result<Self::Output> {
        Ok(output)
    }
}

/// Calls with a pointer to `argument`.
///
/// # Safety
/// The kernel's handler of `number` on this kind of fd reads and writes at most the bytes of `argument` (or as many as an
/// `argsz` or `size` field in it says, which must not exceed what is there), and every pointer inside it is valid for
/// what the handler does with it.
pub(super) unsafe fn with_pointer<T>(fd: BorrowedFd<'_>, number: u8, argument: *mut T) -> io::Result<IoctlOutput> {
    // SAFETY: the caller's promise is the promise that `Ioctl` asks for.
    unsafe { ioctl(fd, Call { opcode: opcode::none(TYPE, number), argument: argument.cast() }) }
}

/// Calls with a plain number.
///
/// # Safety
/// The handler of `number` takes a number, not a pointer.
pub(super) unsafe fn with_value(fd: BorrowedFd<'_>, number: u8, value: usize) -> io::Result<IoctlOutput> {
    let argument = std::ptr::without_provenance_mut::<c_void>(value);
    // SAFETY: the caller's promise; the number is never dereferenced.
    unsafe { ioctl(fd, Call { opcode: opcode::none(TYPE, number), argument }) }
}

/// Calls by a whole opcode with a pointer or a number: for interfaces that are not VFIO's, which encode more than a number.
///
/// # Safety
/// As [`with_pointer`] or [`with_value`], whichever the handler of `opcode` takes.
pub(super) unsafe fn with_opcode(fd: BorrowedFd<'_>, opcode: Opcode, argument: *mut c_void) -> io::Result<IoctlOutput> {
    // SAFETY: the caller's promise is the promise that `Ioctl` asks for.
    unsafe { ioctl(fd, Call { opcode, argument }) }
}
