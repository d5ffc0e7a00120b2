//! The calls of OpenSSL that the `openssl` crate does not offer. All unsafe code of
//! DTLS is here.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_long, c_void};
use std::ptr;
use std::time::Duration;

use foreign_types::ForeignTypeRef;
use openssl::ssl::{SslContextBuilder, SslStream};

use super::MAX_MESSAGE;

/// `BIO_ADDR`, of which nothing is known here.
#[repr(C)]
struct BioAddr {
    _private: [u8; 0],
}

unsafe extern "C" {
    fn BIO_ADDR_new() -> *mut BioAddr;
    fn BIO_ADDR_free(address: *mut BioAddr);
    fn DTLSv1_listen(ssl: *mut openssl_sys::SSL, client: *mut BioAddr) -> c_int;
    fn SSL_get_state(ssl: *const openssl_sys::SSL) -> c_int;
    fn SSL_SESSION_get_max_fragment_length(session: *const openssl_sys::SSL_SESSION) -> u8;
}

// Of `openssl/ssl.h`, where these are macros around SSL_ctrl and SSL_CTX_ctrl.
const SSL_CTRL_SET_MAX_CERT_LIST: c_int = 51;
const DTLS_CTRL_GET_TIMEOUT: c_int = 73;
const DTLS_CTRL_HANDLE_TIMEOUT: c_int = 74;

/// `DTLSv1_listen`: reads a ClientHello with a cookie and puts the handshake where
/// the cookie exchange has left it. Says whether it took it.
pub(super) fn listen<S>(stream: &mut SslStream<S>) -> bool {
    // SAFETY: takes nothing and returns an address of its own, or null.
    let client = unsafe { BIO_ADDR_new() };
    if client.is_null() {
        return false;
    }
    // SAFETY: the stream owns its SSL and is borrowed alone, its BIO is that of its stream, and
    // the address was made above.
    let taken = unsafe { DTLSv1_listen(stream.ssl().as_ptr(), client) };
    // SAFETY: made above, and OpenSSL keeps no pointer to it.
    unsafe { BIO_ADDR_free(client) };
    taken > 0
}

/// `DTLSv1_get_timeout`: how long until the last flight is to be sent again.
pub(super) fn timeout<S>(stream: &SslStream<S>) -> Option<Duration> {
    let mut left = libc::timeval {
        tv_sec: 0,
        tv_usec: 0,
    };
    // SAFETY: the stream owns its SSL; this control writes one timeval and keeps no pointer.
    let armed = unsafe {
        openssl_sys::SSL_ctrl(
            stream.ssl().as_ptr(),
            DTLS_CTRL_GET_TIMEOUT,
            0,
            (&raw mut left).cast::<c_void>(),
        )
    };
    let seconds = Duration::from_secs(u64::try_from(left.tv_sec).unwrap_or(0));
    let micros = Duration::from_micros(u64::try_from(left.tv_usec).unwrap_or(0));
    (armed == 1).then_some(seconds + micros)
}

/// `DTLSv1_handle_timeout`: sends the last flight again if its time has come. False
/// when it was sent too often.
pub(super) fn handle_timeout<S>(stream: &mut SslStream<S>) -> bool {
    // SAFETY: the stream owns its SSL and is borrowed alone; this control takes no pointer.
    let outcome = unsafe {
        openssl_sys::SSL_ctrl(
            stream.ssl().as_ptr(),
            DTLS_CTRL_HANDLE_TIMEOUT,
            0,
            ptr::null_mut(),
        )
    };
    outcome >= 0
}

/// `SSL_get_state`: the message that the handshake has come to.
pub(super) fn stage<S>(stream: &SslStream<S>) -> i32 {
    // SAFETY: the stream owns its SSL, which is only read.
    unsafe { SSL_get_state(stream.ssl().as_ptr()) }
}

/// The most bytes of a message that the device wants in a record (RFC 6066, 4).
pub(super) fn max_fragment<S>(stream: &SslStream<S>) -> usize {
    let code = stream.ssl().session().map_or(0, |session| {
        // SAFETY: the session is alive and only read.
        unsafe { SSL_SESSION_get_max_fragment_length(session.as_ptr()) }
    });
    match code {
        1..=4 => 256 << code,
        _ => MAX_MESSAGE,
    }
}

/// `SSL_CTX_set_max_cert_list`: the largest handshake message taken from a device.
pub(super) fn set_max_cert_list(context: &mut SslContextBuilder, bytes: c_long) {
    // SAFETY: the context is alive and borrowed alone; this control takes no pointer.
    unsafe {
        openssl_sys::SSL_CTX_ctrl(
            context.as_ptr(),
            SSL_CTRL_SET_MAX_CERT_LIST,
            bytes,
            ptr::null_mut(),
        )
    };
}
