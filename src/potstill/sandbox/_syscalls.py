"""Linux system calls by what a sandboxed program may do with them: `name:number on x86_64:number on aarch64`, `-` for none."""

# what an interpreter, its standard library and threads need; none reaches outside the mounts, processes and limits
ALLOW = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70 preadv2:327:286
pwritev2:328:287 open:2:- openat:257:56 creat:85:- close:3:57 close_range:436:436 stat:4:- fstat:5:80 lstat:6:-
newfstatat:262:79 statx:332:291 access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:- readlinkat:267:78
getcwd:79:17 chdir:80:49 fchdir:81:50 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:-
renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 chmod:90:- fchmod:91:52
fchmodat:268:53 umask:95:166 utime:132:- utimes:235:- futimesat:261:- utimensat:280:88 truncate:76:45 ftruncate:77:46
fallocate:285:47 fsync:74:82 fdatasync:75:83 fadvise64:221:223 sendfile:40:71 copy_file_range:326:285 getdents:78:-
getdents64:217:61 lseek:8:62 statfs:137:43 fstatfs:138:44 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11
llistxattr:195:12 flistxattr:196:13 flock:73:32 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 poll:7:-
ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:-
epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284:- eventfd2:290:19 timerfd_create:283:85 timerfd_settime:286:86
timerfd_gettime:287:87 mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 msync:26:227 brk:12:214
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:- alarm:37:- setitimer:38:103 getitimer:36:102 kill:62:129
tkill:200:130 tgkill:234:131 restart_syscall:219:128 nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113
clock_getres:229:114 gettimeofday:96:169 time:201:- times:100:153 getrandom:318:278 getpid:39:172 getppid:110:173
gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getgroups:115:158 getresuid:118:148
getresgid:120:150 getpgid:121:155 getpgrp:111:- getsid:124:156 setsid:112:157 setpgid:109:154 getpriority:140:141
getrlimit:97:163 setrlimit:160:164 getrusage:98:165 sysinfo:99:179 uname:63:160 getcpu:309:168 sched_yield:24:124
sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
sched_get_priority_min:147:126 futex:202:98 set_robust_list:273:99 get_robust_list:274:100 set_tid_address:218:96
rseq:334:293 membarrier:324:283 arch_prctl:158:- exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 recvfrom:45:207
shutdown:48:210
"""

# allowed by their arguments; see `seccomp.CHECKS`
CHECKED = """
clone:56:220 fcntl:72:25 ioctl:16:29 prctl:157:167 prlimit64:302:261 sendto:44:206 socketpair:53:199
"""

# honest programs try these and go on without: EPERM
REFUSE = """
fork:57:- vfork:58:- execve:59:221 execveat:322:281 socket:41:198 connect:42:203 bind:49:200 listen:50:201 accept:43:202
accept4:288:242 sendmsg:46:211 recvmsg:47:212 sendmmsg:307:269 recvmmsg:299:243 getsockopt:55:209 setsockopt:54:208
getsockname:51:204 getpeername:52:205 shmget:29:194 shmat:30:196 shmctl:31:195 shmdt:67:197 msgget:68:186 msgsnd:69:189
msgrcv:70:188 msgctl:71:187 semget:64:190 semop:65:193 semctl:66:191 semtimedop:220:192 mq_open:240:180 mq_unlink:241:181
mq_timedsend:242:182 mq_timedreceive:243:183 mq_notify:244:184 mq_getsetattr:245:185 memfd_create:319:279
memfd_secret:447:447 chown:92:- fchown:93:55 lchown:94:- fchownat:260:54 setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7
removexattr:197:14 lremovexattr:198:15 fremovexattr:199:16 mknod:133:- mknodat:259:33 setuid:105:146 setgid:106:144
setreuid:113:145 setregid:114:143 setresuid:117:147 setresgid:119:149 setgroups:116:159 setfsuid:122:151 setfsgid:123:152
capget:125:90 capset:126:91 personality:135:92 seccomp:317:277 setpriority:141:140 sched_setaffinity:203:122
sched_setscheduler:144:119 sched_setparam:142:118 sched_setattr:314:274 ioprio_set:251:30 rt_sigqueueinfo:129:138
rt_tgsigqueueinfo:297:240 mlock:149:228 mlock2:325:284 mlockall:151:230 sync:162:81 syncfs:306:267 sethostname:170:161
setdomainname:171:162 settimeofday:164:170 clock_settime:227:112 adjtimex:159:171 clock_adjtime:305:266 syslog:103:116
quotactl:179:60 vhangup:153:58 nfsservctl:180:42 splice:275:76 tee:276:77 vmsplice:278:75 inotify_init:253:-
inotify_init1:294:26 fanotify_mark:301:263 timer_create:222:107 signalfd:282:- signalfd4:289:74 pidfd_open:434:434
pidfd_send_signal:424:424 lookup_dcookie:212:18 modify_ldt:154:- mbind:237:235 set_mempolicy:238:237 migrate_pages:256:238
move_pages:279:239 remap_file_pages:216:234
"""

# no honest program makes these: the program ends, and its wait status says SIGSYS
KILL = """
ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 mount:165:40 umount2:166:39 pivot_root:155:41
chroot:161:51 unshare:272:97 setns:308:268 open_tree:428:428 move_mount:429:429 fsopen:430:430 fsconfig:431:431
fsmount:432:432 fspick:433:433 mount_setattr:442:442 kexec_load:246:104 kexec_file_load:320:294 init_module:175:105
finit_module:313:273 delete_module:176:106 bpf:321:280 userfaultfd:323:282 perf_event_open:298:241 io_uring_setup:425:425
io_uring_enter:426:426 io_uring_register:427:427 keyctl:250:219 add_key:248:217 request_key:249:218
name_to_handle_at:303:264 open_by_handle_at:304:265 reboot:169:142 swapon:167:224 swapoff:168:225 acct:163:89 iopl:172:-
ioperm:173:- kcmp:312:272 fanotify_init:300:262 pidfd_getfd:438:438 process_madvise:440:440
"""
