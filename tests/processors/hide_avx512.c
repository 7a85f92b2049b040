/* Runs a program as on a processor without AVX-512, VNNI and AMX; with HIDE_AS_AMD=1 as on an AMD EPYC (Zen 2).

   Libraries choose their kernels by the instruction CPUID. On Linux for x86-64, processors that can make CPUID fault
   let a process answer it itself: this library, preloaded, executes the instruction, clears the bits, and goes on.

       cc -O2 -shared -fPIC -o hide_avx512.so hide_avx512.c
       LD_PRELOAD=./hide_avx512.so python ...

   As an AMD, caches that only an AMD describes are unknown, and OpenVINO's int8 answers are wrong; whether a real one
   has that fault is not known.

   The program ends with status 77 where the processor or the kernel cannot do this. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define NOT_POSSIBLE 77

static int as_amd;

static long let_cpuid_run(int run) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, run); }

static void answer(int signal_number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *instruction = (const uint8_t *)registers[REG_RIP];
  (void)info;
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) { /* a true fault: let it happen again, unhandled */
    signal(signal_number, SIG_DFL);
    return;
  }
  uint32_t leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
  let_cpuid_run(1);
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(part));
  let_cpuid_run(0);
  if (leaf == 7 && part == 0) {
    b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31); /* AVX-512 F to VL */
    c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);                                    /* VBMI, VNNI, ... */
    d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);               /* FP16, AMX */
  } else if ((leaf == 7 && part == 1) || leaf == 0x1d || leaf == 0x1e || leaf == 0x24) { /* AVX-VNNI, tiles, AVX10 */
    a = b = c = d = 0;
  }
  if (as_amd && leaf == 0) {
    memcpy(&b, "Auth", 4);
    memcpy(&d, "enti", 4);
    memcpy(&c, "cAMD", 4);
  } else if (as_amd && leaf == 1) {
    a = 0x00830f10; /* Zen 2 */
  } else if (as_amd && leaf == 4) {
    a = 0; /* AMD describes its caches elsewhere */
  }
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
  struct sigaction action;
  as_amd = getenv("HIDE_AS_AMD") != NULL;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, NULL);
  if (let_cpuid_run(0) != 0) {
    fputs("this processor or kernel cannot hide instructions\n", stderr);
    _exit(NOT_POSSIBLE);
  }
}
