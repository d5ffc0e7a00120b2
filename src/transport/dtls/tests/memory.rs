//! What a session costs.

use super::*;

/// Resident memory of this process.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Prints what an idle session takes. Alone in its process, or the figure is of all:
/// `cargo test --release --lib -- --ignored --nocapture idle_sessions`.
#[test]
#[ignore = "measures the whole process"]
fn idle_sessions_are_small() {
    const SESSIONS: usize = 5_000;
    for cipher in ["ECDHE-ECDSA-AES128-GCM-SHA256", "PSK-AES128-CCM8"] {
        let context = context();
        let warm: Vec<_> = (0..50)
            .map(|_| established(&context, Device::with(cipher)))
            .collect();
        drop(warm);
        let before = resident();
        let mut sessions = Vec::new();
        for _ in 0..SESSIONS {
            let (mut device, mut session) = established(&context, Device::with(cipher));
            assert_alive(&mut device, &mut session);
            assert_eq!(read(&mut session), None);
            assert_eq!(session.next_datagram(), None);
            sessions.push(session);
        }
        let each = (resident() - before) / SESSIONS;
        println!("{cipher}: {each} bytes each");
        assert!(each < 32 * 1024, "{each}");
    }
}
